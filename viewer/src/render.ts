/**
 * Draws one column after the other on a single WebGL 2 canvas, to be copied from there: browsers allow only a few
 * WebGL contexts a page, and the ghost is uploaded once.
 */

import { axes, distanceTo, projection, type Camera } from "./camera";
import { type Mesh, type Scene, type Vector } from "./geometry";

export type Colour = [number, number, number];

export interface Look {
  camera: Camera;
  ghost: boolean;
  planes: boolean;
  colours: boolean;
  /** Of the ghost and the planes: that of the text. */
  ink: Colour;
}

export interface Renderer {
  canvas: HTMLCanvasElement;
  draw(column: number, width: number, height: number, look: Look): void;
}

interface Solid {
  array: WebGLVertexArrayObject;
  count: number;
}

const PALETTE = 7; // colours that classes may have; one more is that of matter without a class
const ROOM = 1.6;
const MARGIN = 1.08;
const PLAIN_COLOUR: Colour = [0.78, 0.74, 0.68];

const SURFACE = {
  vertex: `#version 300 es
    layout(location = 0) in vec3 position;
    layout(location = 1) in vec3 normal;
    layout(location = 2) in uint matter;
    uniform mat4 clip;
    uniform vec3 origin, eye, colours[${PALETTE + 1}];
    uniform float step_mm;
    out vec3 n, colour, toEye;
    void main() {
      vec3 p = origin + step_mm * position;
      n = normal;
      toEye = eye - p;
      colour = colours[min(matter, ${PALETTE}u)];
      gl_Position = clip * vec4(p, 1.0);
    }`,
  // The winding of meshes is not to be trusted: whatever side is seen is the front.
  fragment: `#version 300 es
    precision highp float;
    in vec3 n, colour, toEye;
    uniform vec3 lamp, ink;
    uniform float ghost;
    out vec4 pixel;
    void main() {
      vec3 v = normalize(toEye), m = normalize(n);
      m = dot(m, v) < 0.0 ? -m : m;
      float facing = dot(m, v);
      if (ghost > 0.0) {
        pixel = vec4(ink, 1.0) * (0.06 + 0.5 * pow(1.0 - facing, 2.5));
        return;
      }
      float light = 0.32 + 0.68 * (0.5 + 0.5 * dot(m, lamp));
      float shine = 0.16 * pow(max(dot(m, normalize(lamp + v)), 0.0), 24.0);
      float rim = 1.0 - 0.35 * pow(1.0 - facing, 3.0);
      pixel = vec4(colour * light * rim + shine, 1.0);
    }`,
};

const PLANE = {
  vertex: `#version 300 es
    layout(location = 0) in vec3 position;
    layout(location = 1) in vec2 corner;
    uniform mat4 clip;
    out vec2 at;
    void main() {
      at = corner;
      gl_Position = clip * vec4(position, 1.0);
    }`,
  fragment: `#version 300 es
    precision highp float;
    in vec2 at;
    uniform vec3 ink;
    uniform float thickness;
    out vec4 pixel;
    void main() {
      vec2 edge = min(at, 1.0 - at) / fwidth(at);
      float line = 1.0 - smoothstep(thickness - 0.5, thickness + 0.5, min(edge.x, edge.y));
      pixel = vec4(ink, 1.0) * mix(0.1, 0.85, line);
    }`,
};

/** Null where the browser has no WebGL 2. */
export function renderer(scene: Scene, meshes: Mesh[], ghostMesh: Mesh | null): Renderer | null {
  const canvas = document.createElement("canvas");
  const gl = canvas.getContext("webgl2", { antialias: true, alpha: true, premultipliedAlpha: true });
  if (!gl) return null;
  const surface = program(gl, SURFACE);
  const plane = program(gl, PLANE);
  const solids = meshes.map((mesh) => upload(gl, mesh));
  const ghost = ghostMesh && upload(gl, ghostMesh);
  const planes = uploadPlanes(gl, scene.planes);
  const palette = scene.colours.map(fromHex);
  const [centre, radius] = framed(scene, meshes, ghostMesh);
  gl.enable(gl.DEPTH_TEST);
  gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
  gl.polygonOffset(1, 1);

  return {
    canvas,
    draw(column, width, height, look) {
      if (canvas.width < width) canvas.width = width;
      if (canvas.height < height) canvas.height = height;
      gl.viewport(0, canvas.height - height, width, height);
      gl.clearColor(0, 0, 0, 0);
      gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
      const clip = projection(look.camera, centre, radius, width / height);
      const [right, up, back] = axes(look.camera);
      const eye = centre.map((value, k) => value + distanceTo(radius) * back[k]!);
      const lamp = back.map((value, k) => (value * 8 + up[k]! * 5 - right[k]! * 4) / Math.sqrt(105));
      const colours = look.colours ? [...palette, PLAIN_COLOUR] : Array<Colour>(PALETTE + 1).fill(PLAIN_COLOUR);

      gl.useProgram(surface.id);
      gl.uniformMatrix4fv(surface.at("clip"), false, clip);
      gl.uniform3fv(surface.at("origin"), scene.origin);
      gl.uniform1f(surface.at("step_mm"), scene.step);
      gl.uniform3fv(surface.at("eye"), eye);
      gl.uniform3fv(surface.at("lamp"), lamp);
      gl.uniform3fv(surface.at("ink"), look.ink);
      gl.uniform3fv(surface.at("colours"), colours.flat());
      gl.uniform1f(surface.at("ghost"), 0);
      triangles(gl, solids[column]!);

      gl.enable(gl.BLEND);
      gl.depthMask(false);
      if (ghost && look.ghost) {
        gl.uniform1f(surface.at("ghost"), 1);
        gl.enable(gl.POLYGON_OFFSET_FILL); // where it coincides with the mesh, the mesh is seen
        triangles(gl, ghost);
        gl.disable(gl.POLYGON_OFFSET_FILL);
      }
      if (look.planes) {
        gl.useProgram(plane.id);
        gl.uniformMatrix4fv(plane.at("clip"), false, clip);
        gl.uniform3fv(plane.at("ink"), look.ink);
        gl.uniform1f(plane.at("thickness"), Math.max(1.5, Math.min(width, height) / 260));
        triangles(gl, planes);
      }
      gl.depthMask(true);
      gl.disable(gl.BLEND);
    },
  };
}

/**
 * Centre and radius in mm of what the camera shows at first: all of the meshes, round the middle of the ghost if there
 * is one, but no more than `ROOM` times the ghost, so that specks far away do not make everything tiny.
 */
function framed(scene: Scene, meshes: Mesh[], ghost: Mesh | null): [Vector, number] {
  const middle = ghost ? boxMiddle(ghost) : (scene.size.map((side) => side / scene.step / 2) as Vector);
  const all = Math.max(...meshes.map((mesh) => reach(mesh, middle)));
  const own = ghost ? reach(ghost, middle) : all;
  const radius = MARGIN * Math.min(Math.max(all, own), ROOM * own) * scene.step;
  return [middle.map((value, k) => scene.origin[k]! + scene.step * value) as Vector, radius];
}

function boxMiddle(mesh: Mesh): Vector {
  const [low, high]: [Vector, Vector] = [[65535, 65535, 65535], [0, 0, 0]];
  mesh.positions.forEach((value, i) => {
    low[i % 3] = Math.min(low[i % 3]!, value);
    high[i % 3] = Math.max(high[i % 3]!, value);
  });
  return low.map((value, k) => (value + high[k]!) / 2) as Vector;
}

/** Largest distance of a vertex from a point, in steps. */
function reach(mesh: Mesh, [x, y, z]: Vector): number {
  const { positions } = mesh;
  let squared = 1;
  for (let i = 0; i < positions.length; i += 3) {
    squared = Math.max(squared, (positions[i]! - x) ** 2 + (positions[i + 1]! - y) ** 2 + (positions[i + 2]! - z) ** 2);
  }
  return Math.sqrt(squared);
}

function triangles(gl: WebGL2RenderingContext, solid: Solid): void {
  gl.bindVertexArray(solid.array);
  gl.drawElements(gl.TRIANGLES, solid.count, gl.UNSIGNED_INT, 0);
}

function program(gl: WebGL2RenderingContext, source: { vertex: string; fragment: string }) {
  const id = gl.createProgram();
  for (const [kind, text] of [[gl.VERTEX_SHADER, source.vertex], [gl.FRAGMENT_SHADER, source.fragment]] as const) {
    const shader = gl.createShader(kind)!;
    gl.shaderSource(shader, text);
    gl.compileShader(shader);
    gl.attachShader(id, shader);
  }
  gl.linkProgram(id);
  if (!gl.getProgramParameter(id, gl.LINK_STATUS)) {
    const shaders = gl.getAttachedShaders(id) ?? [];
    throw new Error([gl.getProgramInfoLog(id), ...shaders.map((shader) => gl.getShaderInfoLog(shader))].join(" "));
  }
  return { id, at: (name: string) => gl.getUniformLocation(id, name) };
}

function upload(gl: WebGL2RenderingContext, mesh: Mesh): Solid {
  const array = gl.createVertexArray();
  gl.bindVertexArray(array);
  // Attributes start at multiples of four bytes: three of 16 or 8 bits are padded to four.
  attribute(gl, 0, padded(mesh.positions, new Uint16Array((mesh.positions.length / 3) * 4)));
  gl.vertexAttribPointer(0, 3, gl.UNSIGNED_SHORT, false, 8, 0);
  attribute(gl, 1, padded(mesh.normals, new Int8Array((mesh.normals.length / 3) * 4)));
  gl.vertexAttribPointer(1, 3, gl.BYTE, true, 4, 0);
  attribute(gl, 2, mesh.classes);
  gl.vertexAttribIPointer(2, 1, gl.UNSIGNED_BYTE, 0, 0);
  return elements(gl, array, mesh.triangles);
}

function uploadPlanes(gl: WebGL2RenderingContext, planes: Vector[][]): Solid {
  const array = gl.createVertexArray();
  gl.bindVertexArray(array);
  attribute(gl, 0, new Float32Array(planes.flat(2)));
  gl.vertexAttribPointer(0, 3, gl.FLOAT, false, 0, 0);
  attribute(gl, 1, new Float32Array(planes.flatMap(() => [0, 0, 1, 0, 1, 1, 0, 1])));
  gl.vertexAttribPointer(1, 2, gl.FLOAT, false, 0, 0);
  return elements(gl, array, new Uint32Array(planes.flatMap((_, k) => [0, 1, 2, 0, 2, 3].map((i) => 4 * k + i))));
}

function attribute(gl: WebGL2RenderingContext, location: number, data: ArrayBufferView<ArrayBufferLike>): void {
  gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
  gl.bufferData(gl.ARRAY_BUFFER, data, gl.STATIC_DRAW);
  gl.enableVertexAttribArray(location);
}

function elements(gl: WebGL2RenderingContext, array: WebGLVertexArrayObject, indices: Uint32Array): Solid {
  gl.bindBuffer(gl.ELEMENT_ARRAY_BUFFER, gl.createBuffer());
  gl.bufferData(gl.ELEMENT_ARRAY_BUFFER, indices, gl.STATIC_DRAW);
  return { array, count: indices.length };
}

function padded<T extends Uint16Array | Int8Array>(from: T, to: T): T {
  for (let i = 0; 3 * i < from.length; i++) for (let k = 0; k < 3; k++) to[4 * i + k] = from[3 * i + k]!;
  return to;
}

function fromHex(text: string): Colour {
  return [1, 3, 5].map((i) => parseInt(text.slice(i, i + 2), 16) / 255) as Colour;
}
