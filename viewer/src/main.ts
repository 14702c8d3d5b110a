/** Brings the page to life: unpacks its meshes, draws every column with one camera, and minds the controls. */

import "./page.css";
import { HOME, listen, words, type Camera } from "./camera";
import { unpack, type Scene } from "./geometry";
import { renderer, type Colour, type Look, type Renderer } from "./render";

const byId = <T extends HTMLElement>(id: string): T | null => document.getElementById(id) as T | null;
const canvases = [...document.querySelectorAll<HTMLCanvasElement>("figure canvas")];
const camera: Camera = { ...HOME };
const NO_WEBGL =
  "This browser shows no 3D graphics: WebGL 2 is missing or switched off. The titles and figures below still hold.";

minded("theme", switchTheme);
start().catch((error: unknown) => complain(`The meshes could not be drawn: ${String(error)}`));

async function start(): Promise<void> {
  const scene = JSON.parse(byId("scene")!.textContent!) as Scene;
  const meshes = await Promise.all(scene.columns.map(unpack));
  const ghost = scene.ghost && (await unpack(scene.ghost));
  let drawer = renderer(scene, meshes, ghost);
  if (!drawer) return complain(NO_WEBGL);

  let due = 0;
  const redraw = (): void => {
    due ||= requestAnimationFrame(() => {
      due = 0;
      if (drawer) canvases.forEach((canvas, column) => show(drawer!, canvas, column));
      byId("view")!.textContent = words(camera);
      document.documentElement.dataset.drawn = words(camera);
    });
  };
  const mindLoss = (canvas: HTMLCanvasElement): void => {
    canvas.addEventListener("webglcontextlost", (event) => event.preventDefault());
    canvas.addEventListener("webglcontextrestored", () => {
      drawer = renderer(scene, meshes, ghost);
      if (!drawer) return complain(NO_WEBGL);
      mindLoss(drawer.canvas);
      redraw();
    });
  };
  mindLoss(drawer.canvas);
  const resized = new ResizeObserver(redraw);
  for (const canvas of canvases) {
    listen(canvas, camera, redraw);
    resized.observe(canvas);
  }
  for (const id of ["ghost", "planes", "colours"]) byId(id)?.addEventListener("change", redraw);
  minded("reset", () => Object.assign(camera, HOME) && redraw());
  minded("theme", redraw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  redraw();
}

function minded(id: string, action: () => void): void {
  byId(id)!.addEventListener("click", action);
}

function show(drawer: Renderer, canvas: HTMLCanvasElement, column: number): void {
  const scale = Math.min(devicePixelRatio, 2);
  const [width, height] = [canvas.clientWidth, canvas.clientHeight].map((side) => Math.round(side * scale));
  if (!width || !height) return;
  if (canvas.width !== width) canvas.width = width;
  if (canvas.height !== height) canvas.height = height;
  drawer.draw(column, width, height, look(canvas));
  const pen = canvas.getContext("2d")!;
  pen.clearRect(0, 0, width, height);
  pen.drawImage(drawer.canvas, 0, 0, width, height, 0, 0, width, height);
}

function look(canvas: HTMLCanvasElement): Look {
  const ticked = (id: string): boolean => byId<HTMLInputElement>(id)?.checked ?? true;
  const ink = (getComputedStyle(canvas).color.match(/[\d.]+/g) ?? []).slice(0, 3).map((part) => Number(part) / 255);
  return { camera, ghost: ticked("ghost"), planes: ticked("planes"), colours: ticked("colours"), ink: ink as Colour };
}

function switchTheme(): void {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
}

function complain(message: string): void {
  const box = byId("problem")!;
  box.textContent = message;
  box.hidden = false;
  document.documentElement.dataset.drawn = "no";
}
