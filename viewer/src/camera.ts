/** One camera for all columns: a turntable round the scene, with superior up, moved by pointer, wheel and keys. */

import { cross, dot, type Vector } from "./geometry";

export interface Camera {
  /** Degrees: 0 is the view from the front (anterior), 90 from the patient's right. */
  turn: number;
  /** Degrees above the horizon. */
  tilt: number;
  zoom: number;
}

export const HOME: Readonly<Camera> = { turn: 30, tilt: 15, zoom: 1 };
const HALF_ANGLE = (12 * Math.PI) / 180; // of the field of view
const KEY_DEGREES = 10;
const DRAG_DEGREES = 0.5; // for each pixel
const ZOOM_STEP = 1.15;
const ZOOM = { least: 0.4, most: 12 };

export function move(camera: Camera, by: { turn?: number; tilt?: number; zoom?: number }): void {
  camera.turn = (((camera.turn + (by.turn ?? 0)) % 360) + 360) % 360;
  camera.tilt = Math.min(90, Math.max(-90, camera.tilt + (by.tilt ?? 0)));
  camera.zoom = Math.min(ZOOM.most, Math.max(ZOOM.least, camera.zoom * (by.zoom ?? 1)));
}

export function words(camera: Camera): string {
  const zoom = Math.round(100 * camera.zoom);
  return `turned ${Math.round(camera.turn)}°, tilted ${Math.round(camera.tilt)}°, zoom ${zoom} %`;
}

/** Rows right, up and back of the viewer in world coordinates. */
export function axes(camera: Camera): [Vector, Vector, Vector] {
  const [turn, tilt] = [camera.turn, camera.tilt].map((degrees) => (degrees * Math.PI) / 180) as [number, number];
  const back: Vector = [Math.cos(tilt) * Math.sin(turn), Math.cos(tilt) * Math.cos(turn), Math.sin(tilt)];
  const right: Vector = [-Math.cos(turn), Math.sin(turn), 0];
  return [right, cross(back, right), back];
}

/** From the centre of a scene in a ball to the viewer. */
export function distanceTo(radius: number): number {
  return radius / Math.sin(HALF_ANGLE);
}

/** World mm -> clip space, column by column, for a picture of this width / height and a scene in a ball. */
export function projection(camera: Camera, centre: Vector, radius: number, aspect: number): Float32Array {
  const [right, up, back] = axes(camera);
  const distance = distanceTo(radius);
  const [near, far] = [distance - 3 * radius, distance + 3 * radius]; // planes may stick out
  const focal = camera.zoom / Math.tan(HALF_ANGLE);
  const across = aspect < 1 ? focal : focal / aspect;
  const upward = aspect < 1 ? focal * aspect : focal;
  const depth = (far + near) / (near - far);
  const out = new Float32Array(16);
  for (let k = 0; k < 3; k++) {
    out.set([across * right[k]!, upward * up[k]!, depth * back[k]!, -back[k]!], 4 * k);
  }
  const z = -dot(back, centre) - distance;
  out.set([-across * dot(right, centre), -upward * dot(up, centre), depth * z + (2 * far * near) / (near - far), -z], 12);
  return out;
}

/** Let one canvas move the camera; `moved` is called after every change. */
export function listen(canvas: HTMLCanvasElement, camera: Camera, moved: () => void): void {
  const pointers = new Map<number, PointerEvent>();
  const spread = (): number => {
    const [a, b] = [...pointers.values()];
    return a && b ? Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY) : 0;
  };
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    canvas.focus({ preventScroll: true });
    pointers.set(event.pointerId, event);
  });
  canvas.addEventListener("pointermove", (event) => {
    const last = pointers.get(event.pointerId);
    if (!last) return;
    const before = spread();
    pointers.set(event.pointerId, event);
    if (pointers.size === 1) {
      const [x, y] = [event.clientX - last.clientX, event.clientY - last.clientY];
      move(camera, { turn: DRAG_DEGREES * x, tilt: DRAG_DEGREES * y });
    } else if (before > 0) {
      move(camera, { zoom: spread() / before });
    }
    moved();
  });
  for (const name of ["pointerup", "pointercancel"] as const) {
    canvas.addEventListener(name, (event) => pointers.delete(event.pointerId));
  }
  canvas.addEventListener(
    "wheel",
    (event) => {
      // A page of many pictures must still scroll: the wheel belongs to a picture once it was clicked.
      if (document.activeElement !== canvas && !event.ctrlKey) return;
      event.preventDefault();
      move(camera, { zoom: Math.exp(-event.deltaY / 600) });
      moved();
    },
    { passive: false },
  );
  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !press(camera, event.key)) return;
    event.preventDefault();
    moved();
  });
}

function press(camera: Camera, key: string): boolean {
  if (key === "ArrowLeft") move(camera, { turn: -KEY_DEGREES });
  else if (key === "ArrowRight") move(camera, { turn: KEY_DEGREES });
  else if (key === "ArrowUp") move(camera, { tilt: KEY_DEGREES });
  else if (key === "ArrowDown") move(camera, { tilt: -KEY_DEGREES });
  else if (key === "+" || key === "=") move(camera, { zoom: ZOOM_STEP });
  else if (key === "-" || key === "_") move(camera, { zoom: 1 / ZOOM_STEP });
  else if (key === "0") Object.assign(camera, HOME);
  else return false;
  return true;
}
