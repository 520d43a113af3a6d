// Renders people of the toon world: raw RGB pictures and one JSON line for each.
//
//   node render.mjs --first 0 --people 12000 --contexts 4 --out FILE   a random context for each picture
//   node render.mjs --plan PLAN.jsonl --out FILE                        one {"person": n, "context": {...}} per line
//
// Writes FILE.rgb (64 x 64 x 3 bytes per picture) and FILE.jsonl. A person is a pure function of its number, and so is
// a person's n-th random context: the same call gives the same bytes. Styles are filters that are applied later, in Python.
import { createWriteStream, readFileSync } from "node:fs";
import { parseArgs } from "node:util";
import { Resvg } from "@resvg/resvg-js";
import { faceToSvgString, generate } from "facesjs";

const SIZE = 64;
const contexts = JSON.parse(readFileSync(new URL("contexts.json", import.meta.url)));
const { values: args } = parseArgs({
  options: {
    first: { type: "string", default: "0" },
    people: { type: "string", default: "1" },
    contexts: { type: "string", default: "4" },
    plan: { type: "string" },
    out: { type: "string" },
  },
});

// mulberry32, a seeded generator that replaces Math.random, which facesjs draws from
function seeded(seed) {
  let a = seed >>> 0;
  return () => {
    a = (a + 0x6d2b79f5) | 0;
    let t = Math.imul(a ^ (a >>> 15), 1 | a);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

const pick = (random, list) => list[Math.floor(random() * list.length)];

const HAIR_COLORS = ["#272421", "#3d2314", "#5a3825", "#8d5524", "#cc9966", "#b55239", "#e9c67b", "#9c9c9c"];
const SKINS = ["#f2d6cb", "#ddb7a0", "#fedac7", "#f0c5a3", "#eab687", "#bb876f", "#a67358", "#ad6453", "#74453d", "#5c3937"];

function person(number) {
  const random = seeded(number * 7919 + 17);
  Math.random = random;
  const gender = random() < 0.5 ? "male" : "female";
  const face = generate(undefined, { gender });
  // wider palettes than the library's: hair and skin are chosen independently of one another
  face.hair.color = pick(random, HAIR_COLORS);
  face.body.color = pick(random, SKINS);
  face.body.id = "body";
  face.body.size = 1;
  face.jersey.id = "jersey";
  return { face, gender };
}

function randomContext(number, index) {
  const random = seeded(number * 104729 + index * 15485863 + 3);
  const choose = (kind, plain) => (random() < plain ? Object.keys(contexts[kind])[0] : pick(random, Object.keys(contexts[kind])));
  const style = choose("style", 0.45);
  return {
    style,
    background: contexts.style[style].colors ? choose("background", 0.0) : "white",
    headwear: choose("headwear", 0.5),
    eyewear: choose("eyewear", 0.55),
    expression: choose("expression", 0.25),
  };
}

function picture(face, context) {
  const head = contexts.headwear[context.headwear];
  const mood = contexts.expression[context.expression];
  const changed = structuredClone(face);
  changed.teamColors = ["#c23b34", "#f2efe6", "#2b2b33"];
  changed.accessories.id = head.id;
  changed.glasses.id = contexts.eyewear[context.eyewear].id;
  changed.mouth = { id: mood.mouth, flip: false };
  changed.eyebrow.angle = face.eyebrow.angle * 0.5 + mood.brow;
  const svg = faceToSvgString(changed).replace('viewBox="0 0 400 600"', 'viewBox="10 110 380 380"');
  const big = new Resvg(svg, {
    background: contexts.background[context.background].color,
    fitTo: { mode: "width", value: 2 * SIZE },
    font: { loadSystemFonts: false },
  }).render();
  return halve(big.pixels);
}

// [1 3 3 1] / 8 over both axes, stride 2: a little softer than a box filter, so that 8 x 8 latents reconstruct the pictures better
function halve(rgba) {
  const n = 2 * SIZE, taps = [1, 3, 3, 1], rgb = Buffer.alloc(SIZE * SIZE * 3);
  for (let y = 0; y < SIZE; y++)
    for (let x = 0; x < SIZE; x++)
      for (let c = 0; c < 3; c++) {
        let sum = 0;
        for (let j = 0; j < 4; j++) {
          const row = Math.min(n - 1, Math.max(0, 2 * y - 1 + j)) * n;
          for (let i = 0; i < 4; i++)
            sum += taps[j] * taps[i] * rgba[(row + Math.min(n - 1, Math.max(0, 2 * x - 1 + i))) * 4 + c];
        }
        rgb[(y * SIZE + x) * 3 + c] = Math.round(sum / 64);
      }
  return rgb;
}

function* plan() {
  if (args.plan) {
    for (const line of readFileSync(args.plan, "utf8").split("\n").filter(Boolean)) yield JSON.parse(line);
    return;
  }
  const first = Number(args.first);
  for (let number = first; number < first + Number(args.people); number++)
    for (let index = 0; index < Number(args.contexts); index++) yield { person: number, context: randomContext(number, index) };
}

const pixels = createWriteStream(`${args.out}.rgb`), lines = createWriteStream(`${args.out}.jsonl`);
let last = { number: -1 };
for (const job of plan()) {
  if (last.number !== job.person) last = { number: job.person, ...person(job.person) };
  const { face, gender } = last;
  const identity = { gender, hair: face.hair.id, hairBg: face.hairBg.id, hairColor: face.hair.color, skin: face.body.color, facialHair: face.facialHair.id };
  const buffer = picture(face, job.context);
  if (!pixels.write(buffer)) await new Promise((done) => pixels.once("drain", done));
  lines.write(JSON.stringify({ person: job.person, context: job.context, identity }) + "\n");
}
pixels.end();
lines.end();
