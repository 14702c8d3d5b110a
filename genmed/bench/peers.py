"""Peers of the published tables, trained by the same loop on the same patches.

    python -m genmed.bench.peers --data DIR --out DIR --split FILE --minutes M [--network dynunet]
        [--augmentation nnunet] [--cases N --draw K] [--preset base] [--spacing 2] [--init DIR] [--resume]

Every network gets our split, plan, patches, augmentation, optimiser, averaged weights and minutes:

- `dynunet`: MONAI's DynUNet, the nnU-Net architecture, with nnU-Net's deep supervision on top;
- `swinunetr`: MONAI's SwinUNETR at the feature size whose parameters come nearest to ours;
- `diffusion`: our own network as the input-conditioned diffusion model of the literature, which denoises the
  label given the clean image and knows nothing else of the joint.

Minutes are `genmed.train.fair_minutes`: without CUDA, CPU time, so that other work on the machine does not count.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import load, save
from torch import Generator, Tensor, nn

from genmed.data.augment import augment
from genmed.data.dataset import read_dataset
from genmed.data.split import read_split
from genmed.denoiser import SHARPEST_LABEL_SIGMA, Denoiser, build
from genmed.errors import GenMedError
from genmed.fields import one_hot, probabilities
from genmed.files import write_bytes, write_json
from genmed.loss import Batch, categorical_loss
from genmed.nets.unet import kernel_sizes, pad_to_multiple
from genmed.plan import AUGMENTATIONS, PRESETS, Plan
from genmed.samplers import euler, noise, schedule, seeded
from genmed.train import (
    draw_batch,
    fair_minutes,
    few_shot,
    fit,
    load_scans,
    make_plan,
    settings_of,
    time_spent,
    tune_dice,
)

NETWORKS = ("dynunet", "swinunetr", "diffusion")
HEADS = 2  # deep supervision heads besides the output
SWIN_MULTIPLE = (32, 32, 32)  # SwinUNETR halves every axis five times
SWIN_FEATURES = 12  # its feature size is a multiple of this
STEPS, DRAWS = 5, 4  # of the diffusion peer: noise levels of a label, and labels whose probabilities are averaged
HIDDEN = 0.2  # share of its training that sees no label at all, as the first step of a sample does
WEIGHTS, BEST, PLAN, TRAINING = "weights.safetensors", "best.safetensors", "plan.json", "training.json"


def untrained(plan: Plan, network: str) -> nn.Module:
    """The network that a plan and a name from `NETWORKS` describe; in evaluation, images of any size to logits."""
    return Diffusion(plan) if network == "diffusion" else Peer(plan, network)


class Peer(nn.Module):
    """DynUNet or SwinUNETR that takes images of any size: padded with zeros, and cropped back.

    In training it gives the logits of the output and of the deep supervision heads, which SwinUNETR does not
    have, (b, heads, c, x, y, z), all at full size and best first; in evaluation those of the output,
    (b, c, x, y, z).
    """

    def __init__(self, plan: Plan, network: str = "dynunet") -> None:
        super().__init__()
        self.is_swin = network == "swinunetr"
        self.multiple = SWIN_MULTIPLE if self.is_swin else plan.patch_multiple
        self.net = swinunetr(plan) if self.is_swin else group_norms(without_aliases(dynunet(plan)))

    def forward(self, image: Float[Tensor, "b c x y z"]) -> Tensor:
        x, y, z = image.shape[2:]
        logits = self.net(pad_to_multiple(image, self.multiple))[..., :x, :y, :z]
        return logits[:, None] if self.is_swin and self.training else logits


class Diffusion(nn.Module):
    """Input-conditioned diffusion of the label: a `Denoiser` that only ever sees clean images.

    Called with images it draws labels from noise by Euler's method and gives the logarithm of their mean
    probabilities, which a softmax turns back into them. The noise comes from fixed seeds.
    """

    def __init__(self, plan: Plan, draws: int = 1) -> None:
        super().__init__()
        self.denoiser = build(plan)
        self.draws = draws

    @torch.no_grad()
    def forward(self, image: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b k x y z"]:
        soft = torch.stack([self.draw(image, seed) for seed in range(self.draws)]).mean(dim=0)
        return soft.clamp(min=1e-6).log()

    def draw(self, image: Float[Tensor, "b c x y z"], seed: int) -> Float[Tensor, "b k x y z"]:
        """Probabilities at the end of one trajectory."""
        denoiser, label = self.denoiser, self.denoiser.fields.slice("label")

        def denoise(z: Tensor, sigma: float) -> Tensor:
            levels = z.new_tensor([[0.0, sigma]]).expand(len(z), -1)
            return denoiser(torch.cat([image, z], dim=1), levels)[:, label]

        like = torch.zeros(1, label.stop - label.start, *image.shape[2:])
        start = denoiser.sigma_max * noise(like, seeded([seed])).expand(len(image), -1, -1, -1, -1)
        return probabilities(euler(denoise, start.to(image), schedule(denoiser.sigma_max, 0.5, STEPS)))


class DiffusionLoss(nn.Module):
    """Cross-entropy plus Dice of the label denoised at a random level, given the clean, augmented image.

    The level is the highest, at which the network is shown zeros, for a share `HIDDEN` of the samples; the
    others' logarithms are uniform down to `SHARPEST_LABEL_SIGMA`, below which the noisy voxel says it all.
    """

    def __init__(self, model: Diffusion, augmentation: str = "nnunet") -> None:
        super().__init__()
        self.model = model
        self.augmentation = augmentation

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        generator = Generator().manual_seed(batch.seed)
        denoiser: Denoiser = self.model.denoiser
        image = augmented(batch, self.augmentation, generator)
        label = one_hot(batch.label, len(denoiser.fields["label"].channels))
        share, drawn = torch.rand(2, len(image), generator=generator).to(label)
        sigma = SHARPEST_LABEL_SIGMA * (denoiser.sigma_max / SHARPEST_LABEL_SIGMA) ** drawn
        sigma = torch.where(share < HIDDEN, denoiser.sigma_max, sigma)
        z_label = label + sigma[:, None, None, None, None] * torch.randn(label.shape, generator=generator).to(label)
        levels = torch.stack([torch.zeros_like(sigma), sigma], dim=1)
        logits = denoiser.outputs(torch.cat([image, z_label], dim=1), levels, batch.inside)["label"]
        loss = categorical_loss(logits, batch.label, batch.inside)
        return {"loss": loss, "label": loss}


class SegmentationLoss(nn.Module):
    """Cross-entropy plus Dice of an augmented image, under deep supervision (nnU-Net's weights 1, 1/2, 1/4)."""

    def __init__(self, model: nn.Module, augmentation: str = "nnunet") -> None:
        super().__init__()
        self.model = model
        self.augmentation = augmentation

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        image = augmented(batch, self.augmentation, Generator().manual_seed(batch.seed))
        heads = self.model(image * batch.inside).float().unbind(dim=1)
        weights = torch.tensor([0.5**level for level in range(len(heads))])
        losses = torch.stack([categorical_loss(logits, batch.label, batch.inside) for logits in heads])
        return {"loss": (losses * (weights / weights.sum()).to(losses)).sum(), "label": losses[0]}


def augmented(batch: Batch, kind: str, generator: Generator) -> Float[Tensor, "b c x y z"]:
    """The images of a batch with changed intensities (`genmed.data.augment.augment`)."""
    pairs = zip(batch.image.cpu(), batch.inside.cpu(), strict=True)
    return torch.stack([augment(image, inside, kind, generator) for image, inside in pairs]).to(batch.image)


def dynunet(plan: Plan) -> nn.Module:
    """MONAI's DynUNet as it comes, at the widths and depth of a plan."""
    strides = [list(step) for step in plan.strides]
    return _monai("DynUNet")(
        spatial_dims=3,
        in_channels=len(plan.channels),
        out_channels=len(plan.labels),
        kernel_size=[list(kernel) for kernel in kernel_sizes(plan.strides)],
        strides=[[1, 1, 1], *strides],
        upsample_kernel_size=strides,
        filters=plan.widths,
        norm_name=("INSTANCE", {"affine": True}),
        deep_supervision=True,
        deep_supr_num=min(HEADS, len(strides) - 1),
        res_block=False,
    )


def swinunetr(plan: Plan) -> nn.Module:
    """MONAI's SwinUNETR (arXiv 2201.01266) at the feature size that comes nearest to our network's parameters.

    Its smallest has 3.9 million parameters: over three times those of our preset small, and 17 % less than
    base. For large it has 37 % more. The instance norms of its bottleneck, a single voxel for patches up to 32, would
    erase it there; they are group norms of eight groups instead. The others stay (`group_norms`). Windows are of 4³
    tokens instead of 7³, which are made for patches of 96³ voxels: in patches of 32³ they would be mostly padding, and
    a step takes 7 times as long.
    """

    def built(features: int) -> Any:
        return _monai("SwinUNETR")(len(plan.channels), len(plan.labels), feature_size=features, window_size=4)

    ratio = parameters(build(plan)) / parameters(built(SWIN_FEATURES))
    net = built(SWIN_FEATURES * max(1, round(ratio**0.5)))
    net.encoder10 = group_norms(net.encoder10, groups=8)
    return group_norms(net)


def _monai(name: str) -> Callable[..., Any]:
    try:
        import monai.networks.nets as nets  # imported here: it takes several seconds
    except ImportError as error:
        raise GenMedError("no monai; in the repository, run: pip install -c constraints.txt '.[bench]'") from error
    return getattr(nets, name)


def parameters(model: nn.Module) -> int:
    """Number of trained weights."""
    return sum(weight.numel() for weight in model.parameters())


def without_aliases(net: nn.Module) -> nn.Module:
    """Keep each block of a DynUNet once: `skip_layers`, which forward uses, holds all but the output block.

    Safetensors refuses weights that go by two names.
    """
    for name in ("input_block", "downsamples", "bottleneck", "upsamples", "deep_supervision_heads"):
        delattr(net, name)
    return net


def group_norms(net: nn.Module, groups: int | None = None) -> nn.Module:
    """Replace every instance norm by a group norm, by default of one channel a group, with the same weights.

    With one channel a group the two are the same function, but torch computes the second several times faster
    on a CPU in bfloat16. The peer is given this speed: it sees more patches in its minutes than MONAI's own
    layers would let it.
    """
    for parent in list(net.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.InstanceNorm3d):
                norm = nn.GroupNorm(groups or child.num_features, child.num_features, child.eps, child.affine)
                norm.load_state_dict(child.state_dict())
                setattr(parent, name, norm)
    return net


def train_peer(
    data: str | Path,
    out: str | Path,
    split: str | Path,
    max_minutes: float | None,
    preset: str,
    spacing: float | None = None,
    init: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    steps: int | None = None,
    network: str = "dynunet",
    augmentation: str = "nnunet",
    cases: int | None = None,
    draw: int = 0,
) -> Path:
    """Train a peer exactly as `genmed.train.train` trains ours, and write its folder.

    Args:
        max_minutes: counted by `genmed.train.fair_minutes`.
        init: a peer's folder whose weights to start from, for instance one of a coarser grid.
        network: one of `NETWORKS`.
        augmentation: see `genmed.data.augment.augment`; with `none`, patches are not turned or scaled either.
        cases: train on so many cases of the training part, chosen by the seed `draw` (`few_shot`).

    Returns:
        The folder: half precision weights at the end and of the best validation, plan.json and training.json.
    """
    if network not in NETWORKS:
        raise GenMedError(f"network '{network}' is unknown; choose one of: {', '.join(NETWORKS)}.")
    out = Path(out)
    dataset = read_dataset(data)
    parts = few_shot(read_split(split, dataset.ids), cases, draw)
    plan = make_plan(dataset, parts, out.name, preset, spacing, steps, seed, augmentation, cases or 0, draw)
    scans, tune = load_scans(dataset, plan, parts.train), load_scans(dataset, plan, parts.tune)
    torch.manual_seed(seed)
    model = untrained(plan, network)
    if init is not None:
        _fill(model, Path(init) / WEIGHTS)
    loss = DiffusionLoss if isinstance(model, Diffusion) else SegmentationLoss
    average, _ = fit(
        loss(model, augmentation),  # type: ignore[arg-type]
        lambda step, process: draw_batch(scans, plan, step, process),
        out,
        steps=plan.steps,
        learning_rate=plan.learning_rate,
        max_minutes=max_minutes,
        resume=resume,
        validate=lambda model: tune_dice(logits(model), tune, plan),
        clock=fair_minutes,
        keep_best=lambda model, minutes, scores: write_bytes(
            out / BEST, packed(model, {"minutes": round(minutes, 1), **scores})
        ),
        settings=settings_of(plan, parts.train, network=network),
    )
    if isinstance(average, Diffusion):
        average.draws = DRAWS
    before = read_training(init) if init is not None else {}
    spent = time_spent(out)._asdict()
    training = {
        "network": network,
        "parameters": parameters(average),
        "augmentation": augmentation,
        "cases": len(parts.train),
        "draw": draw if cases else None,
        "few_shot": list(parts.train) if cases else None,
        **{name: round(before.get(name, before.get("minutes", 0.0)) + new, 1) for name, new in spent.items()},
        "tune": tune_dice(logits(average), tune, plan),
        "best": scores_of(out / BEST),
    }
    return save_peer(out, plan, average, training)


def logits(model: nn.Module) -> Callable[[Float[Tensor, "b c x y z"]], Float[Tensor, "b k x y z"]]:
    """Label logits of images on any device, for `tune_dice`."""
    device = next(model.parameters()).device
    return lambda image: model(image.to(device)).to(image.device)


# Folders --------------------------------------------------------------------------------------------------


class TrainedPeer(NamedTuple):
    """A peer ready for inference, whatever its network: called with images, it gives label probabilities."""

    plan: Plan
    model: nn.Module  # images to logits

    @torch.no_grad()
    def __call__(self, image: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b k x y z"]:
        """Label probabilities on the working grid of normalised images (`View.of(plan, scan).image`)."""
        return logits(self.model)(image).softmax(dim=1)


def save_peer(folder: Path, plan: Plan, model: nn.Module, training: dict[str, object]) -> Path:
    """Write weights (half precision), plan and, last, what is known of the training."""
    write_bytes(folder / WEIGHTS, packed(model))
    write_bytes(folder / PLAN, plan.to_json().encode())
    write_json(folder / TRAINING, training)
    return folder


def packed(model: nn.Module, scores: dict[str, float] | None = None) -> bytes:
    """Weights in half precision, integers as they are, as a safetensors file that can hold scores."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    tensors = {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()}
    return save(tensors, {"scores": json.dumps(scores)} if scores else None)


def scores_of(path: Path) -> dict[str, float] | None:
    """Scores that a weights file holds; None without them or without the file."""
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        return json.loads((file.metadata() or {}).get("scores", "null"))


def load_peer(folder: str | Path, best: bool = False) -> TrainedPeer:
    """The peer in a folder, in evaluation mode, with its final weights or those of its best validation.

    Folders of version 0.1, which do not name their network, hold a DynUNet.
    """
    folder = Path(folder)
    network = read_training(folder).get("network", "dynunet")
    if network not in NETWORKS:
        raise GenMedError(f"{folder / TRAINING}: network '{network}' is unknown; update GenMed.")
    plan = Plan.from_json(folder / PLAN)
    model = Diffusion(plan, DRAWS) if network == "diffusion" else Peer(plan, network)
    _fill(model, folder / (BEST if best else WEIGHTS))
    return TrainedPeer(plan, model.eval().requires_grad_(False))


def minutes_of(folder: str | Path) -> float:
    """Minutes that a peer was trained for in all, those of the peer that it started from included."""
    return float(read_training(folder)["minutes"])


def read_training(folder: str | Path) -> dict[str, Any]:
    """What a peer's folder says of its training. Raises `GenMedError` for another folder."""
    path = Path(folder) / TRAINING
    try:
        training = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GenMedError(f"{path}: cannot be read ({error}); give the folder of a trained peer.") from error
    if not isinstance(training, dict) or "minutes" not in training:
        raise GenMedError(f"{path}: does not tell the minutes of a training; give the folder of a trained peer.")
    return training


def _fill(model: nn.Module, path: Path) -> None:
    try:
        model.load_state_dict(load(path.read_bytes()))
    except OSError as error:
        raise GenMedError(f"{path}: {error.strerror}; give the folder of a trained peer.") from error
    except Exception as error:
        raise GenMedError(f"{path}: does not fit this plan; choose the same network, preset and labels.") from error


def main() -> None:
    """Train a peer from the command line; run again with --resume after an interruption."""
    parser = argparse.ArgumentParser(description="Train a peer as ours is trained.")
    parser.add_argument("--data", required=True, help="data set folder with a dataset.json")
    parser.add_argument("--out", required=True, help="folder of the peer")
    parser.add_argument("--split", required=True, help="JSON file with train / tune / report ids")
    parser.add_argument("--minutes", type=float, help="training time; without CUDA, CPU time by torch's threads")
    parser.add_argument("--network", choices=NETWORKS, default="dynunet")
    parser.add_argument("--augmentation", choices=AUGMENTATIONS, default="nnunet")
    parser.add_argument("--cases", type=int, help="few-shot: train on so many cases of the training part")
    parser.add_argument("--draw", type=int, default=0, help="seed of the choice of these cases")
    parser.add_argument("--preset", choices=PRESETS, default="base")
    parser.add_argument("--spacing", type=float, help="isotropic working spacing in mm")
    parser.add_argument("--init", help="folder of a peer to start from")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--steps", type=int, help="training steps at most")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    folder = train_peer(
        a.data, a.out, a.split, a.minutes, a.preset, a.spacing, a.init, a.resume, a.seed, a.steps,
        network=a.network, augmentation=a.augmentation, cases=a.cases, draw=a.draw,
    )  # fmt: skip
    print((folder / TRAINING).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
