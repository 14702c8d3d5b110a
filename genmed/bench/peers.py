"""Peers of the published tables, trained by the same loop on the same patches.

    python -m genmed.bench.peers --data DIR --out DIR --split FILE --minutes M [--preset base] [--spacing 2]
        [--init DIR] [--resume]

MONAI's DynUNet (the nnU-Net architecture) gets our split, plan, patches, augmentation, loss, optimiser,
averaged weights and minutes, and on top of that nnU-Net's deep supervision.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load, save
from torch import Generator, Tensor, nn

from genmed.data.augment import augment_intensity
from genmed.data.dataset import read_dataset
from genmed.data.split import read_split
from genmed.errors import GenMedError
from genmed.files import write_bytes, write_json
from genmed.loss import Batch, categorical_loss
from genmed.nets.unet import kernel_sizes, pad_to_multiple
from genmed.plan import Plan
from genmed.train import draw_batch, fit, load_scans, make_plan, tune_dice

HEADS = 2  # deep supervision heads besides the output
WEIGHTS, PLAN, TRAINING = "weights.safetensors", "plan.json", "training.json"


class Peer(nn.Module):
    """DynUNet that takes images of any size.

    In training it gives the logits of the output and of the deep supervision heads, (b, heads, c, x, y, z),
    all at full size and best first; in evaluation those of the output, (b, c, x, y, z).
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.multiple = plan.patch_multiple
        self.net = group_norms(without_aliases(dynunet(plan)))

    def forward(self, image: Float[Tensor, "b c x y z"]) -> Tensor:
        x, y, z = image.shape[2:]
        return self.net(pad_to_multiple(image, self.multiple))[..., :x, :y, :z]


class SegmentationLoss(nn.Module):
    """Cross-entropy plus Dice under nnU-Net's augmentation and deep supervision (weights 1, 1/2, 1/4)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        generator = Generator().manual_seed(batch.seed)
        image = torch.stack([augment_intensity(x, generator) for x in batch.image.cpu()]).to(batch.image)
        heads = self.model(image * batch.inside).float().unbind(dim=1)
        weights = torch.tensor([0.5**level for level in range(len(heads))])
        losses = torch.stack([categorical_loss(logits, batch.label, batch.inside) for logits in heads])
        return {"loss": (losses * (weights / weights.sum()).to(losses)).sum(), "label": losses[0]}


def dynunet(plan: Plan) -> nn.Module:
    """MONAI's DynUNet as it comes, at the widths and depth of a plan."""
    try:
        from monai.networks.nets import DynUNet  # imported here: it takes several seconds
    except ImportError as error:
        raise GenMedError("monai is not installed; run: pip install 'genmed[bench]'") from error
    strides = [list(step) for step in plan.strides]
    return DynUNet(
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


def without_aliases(net: nn.Module) -> nn.Module:
    """Keep each block of a DynUNet once: `skip_layers`, which forward uses, holds all but the output block.

    Safetensors refuses weights that go by two names.
    """
    for name in ("input_block", "downsamples", "bottleneck", "upsamples", "deep_supervision_heads"):
        delattr(net, name)
    return net


def group_norms(net: nn.Module) -> nn.Module:
    """Replace every instance norm by a group norm of one channel a group, with the same weights.

    The two are the same function, but torch computes the second several times faster on a CPU in bfloat16.
    The peer is given this speed: it sees more patches in its minutes than MONAI's own layers would let it.
    """
    for parent in list(net.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.InstanceNorm3d):
                norm = nn.GroupNorm(child.num_features, child.num_features, child.eps, child.affine)
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
) -> Path:
    """Train the peer exactly as `genmed.train.train` trains ours, and write its folder.

    Args:
        init: a peer's folder whose weights to start from, for instance one of a coarser grid.

    Returns:
        The folder, with half precision weights, plan.json and training.json (minutes and tune Dice).
    """
    out = Path(out)
    dataset = read_dataset(data)
    parts = read_split(split, dataset.ids)
    plan = make_plan(dataset, parts, out.name, preset, spacing, steps, seed)
    scans, tune = load_scans(dataset, plan, parts.train), load_scans(dataset, plan, parts.tune)
    torch.manual_seed(seed)
    model: nn.Module = Peer(plan)
    if init is not None:
        _fill(model, init)
    average, minutes = fit(
        SegmentationLoss(model),
        lambda step, process: draw_batch(scans, plan, step, process),
        out,
        steps=plan.steps,
        learning_rate=plan.learning_rate,
        max_minutes=max_minutes,
        resume=resume,
        validate=lambda model: tune_dice(logits(model), tune, plan),
    )
    before = minutes_of(init) if init is not None else 0.0
    scores = tune_dice(logits(average), tune, plan)
    return save_peer(out, plan, average, {"minutes": round(before + minutes, 1), "tune": scores})


def logits(model: nn.Module) -> Callable[[Float[Tensor, "b c x y z"]], Float[Tensor, "b k x y z"]]:
    """Label logits of images on any device, for `tune_dice`."""
    device = next(model.parameters()).device
    return lambda image: model(image.to(device)).to(image.device)


# Folders --------------------------------------------------------------------------------------------------


def save_peer(folder: Path, plan: Plan, model: nn.Module, training: dict[str, object]) -> Path:
    """Write weights (half precision), plan and, last, what is known of the training."""
    tensors = {name: value.detach().cpu().half().contiguous() for name, value in model.state_dict().items()}
    write_bytes(folder / WEIGHTS, save(tensors))
    write_bytes(folder / PLAN, plan.to_json().encode())
    write_json(folder / TRAINING, training)
    return folder


def load_peer(folder: str | Path) -> tuple[Plan, nn.Module]:
    """The plan and the network, in evaluation mode, of a peer's folder."""
    plan = Plan.from_json(Path(folder) / PLAN)
    model: nn.Module = Peer(plan)
    _fill(model, folder)
    return plan, model.eval().requires_grad_(False)


def minutes_of(folder: str | Path) -> float:
    """Minutes that a peer was trained for in all, those of the peer that it started from included."""
    return float(json.loads((Path(folder) / TRAINING).read_text(encoding="utf-8"))["minutes"])


def _fill(model: nn.Module, folder: str | Path) -> None:
    path = Path(folder) / WEIGHTS
    try:
        model.load_state_dict(load(path.read_bytes()))
    except OSError as error:
        raise GenMedError(f"{path}: {error.strerror}; give the folder of a trained peer.") from error
    except Exception as error:
        raise GenMedError(f"{path}: does not fit this plan; choose the same preset and labels.") from error


def main() -> None:
    """Train the peer from the command line; run again with --resume after an interruption."""
    parser = argparse.ArgumentParser(description="Train MONAI's DynUNet as ours is trained.")
    parser.add_argument("--data", required=True, help="data set folder with a dataset.json")
    parser.add_argument("--out", required=True, help="folder of the peer")
    parser.add_argument("--split", required=True, help="JSON file with train / tune / report ids")
    parser.add_argument("--minutes", type=float, help="training time")
    parser.add_argument("--preset", default="base", help="small, base or large")
    parser.add_argument("--spacing", type=float, help="isotropic working spacing in mm")
    parser.add_argument("--init", help="folder of a peer to start from")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--steps", type=int, help="training steps at most")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    folder = train_peer(
        a.data, a.out, a.split, a.minutes, a.preset, a.spacing, a.init, a.resume, a.seed, a.steps
    )
    print((folder / TRAINING).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
