// Which experts computed each token: a strip of tokens, and under it two maps, layers by experts, of the text
// and of the vision bank. A map's shade says how often an expert was used; pointing at a token, in the strip or
// in the answer, marks the experts that computed it. The strip takes the arrow keys.

const NONE = 255; // a layer without experts
const CELL = 14, GAP = 2;

/** Rows of expert ids as they arrive; `vision` marks the tokens that went to the vision bank. */
class Trace {
  constructor(part) {
    Object.assign(this, { start: part.start, layers: part.layers, chosen: part.chosen });
    this.rows = [];
    this.vision = [];
  }

  add(part) {
    const ids = Uint8Array.from(atob(part.ids), (letter) => letter.charCodeAt(0));
    const width = this.layers * this.chosen;
    const seen = (place) => part.vision.some(([first, end]) => first <= place && place < end);
    for (let token = 0; token < part.tokens; token += 1) {
      this.rows.push(ids.subarray(token * width, (token + 1) * width));
      this.vision.push(seen(part.start + token));
    }
  }

  /** The experts of one token by layer: [layer, [ids]]. */
  choices(index) {
    const found = [];
    for (let layer = 0; layer < this.layers; layer += 1) {
      const ids = [...this.rows[index].subarray(layer * this.chosen, (layer + 1) * this.chosen)];
      if (ids[0] !== NONE) found.push([layer, ids]);
    }
    return found;
  }
}

function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

export class ExpertView {
  /** `experts`: how many a layer has, {text, vision}. The node is `this.node`. */
  constructor(experts) {
    this.experts = experts;
    this.trace = null;
    this.words = []; // what each token of the answer reads, by its row
    this.chosen = -1;
    this.node = make("details", "experts");
    this.node.append(make("summary", "", "Experts"));
    this.strip = make("div", "strip");
    this.strip.tabIndex = 0;
    this.strip.setAttribute("role", "slider");
    this.strip.setAttribute("aria-label", "Token whose experts are shown; arrow keys move");
    this.maps = make("div", "maps");
    this.said = make("p", "said");
    this.said.setAttribute("aria-live", "polite");
    this.node.append(this.strip, this.maps, this.said);
    this.canvas = {};
    for (const bank of ["text", "vision"]) {
      if (!experts[bank]) continue;
      const figure = make("figure", bank);
      this.canvas[bank] = make("canvas", "");
      this.canvas[bank].setAttribute("role", "img");
      figure.append(make("figcaption", "", `${bank} experts`), this.canvas[bank]);
      this.maps.append(figure);
    }
    this.strip.addEventListener("pointermove", (event) => this.mark(this.under(event)));
    this.strip.addEventListener("click", (event) => this.mark(this.under(event)));
    this.strip.addEventListener("keydown", (event) => this.key(event));
    this.node.addEventListener("toggle", () => this.draw());
  }

  /** A piece of the stream: its experts, and the text that its last token added, shown by `node`. */
  add(part, text, node) {
    this.trace ??= new Trace(part);
    this.trace.add(part);
    const row = this.trace.rows.length - 1; // the row that chose this token
    this.words[row] = text;
    if (node) {
      node.addEventListener("pointerenter", () => this.mark(row));
      node.dataset.row = row;
    }
    if (this.node.open) this.draw();
  }

  under(event) {
    const cell = event.target.closest("i");
    return cell ? Number(cell.dataset.row) : this.chosen;
  }

  key(event) {
    const steps = { ArrowRight: 1, ArrowLeft: -1, PageDown: 16, PageUp: -16, Home: -1e9, End: 1e9 };
    if (!(event.key in steps) || !this.trace) return;
    event.preventDefault();
    this.mark(Math.max(0, Math.min(this.trace.rows.length - 1, this.chosen + steps[event.key])));
  }

  mark(row) {
    if (row === this.chosen || !this.trace) return;
    this.chosen = row;
    if (this.node.open) this.draw();
  }

  describe() {
    if (this.chosen < 0 || !this.trace.rows[this.chosen]) return "Point at a token to see its experts.";
    const bank = this.trace.vision[this.chosen] ? "vision" : "text";
    const word = this.words[this.chosen];
    const place = this.trace.start + this.chosen;
    const what = word ? `before “${word.trim() || "␣"}”, token ${place}` : `token ${place}`;
    const list = this.trace.choices(this.chosen).map(([layer, ids]) => `${layer}: ${ids.join(" ")}`);
    return `${what}, ${bank} experts by layer — ${list.join(" · ") || "none"}`;
  }

  draw() {
    if (!this.trace || !this.node.open) return;
    const { rows, vision } = this.trace;
    while (this.strip.childElementCount < rows.length) {
      const row = this.strip.childElementCount;
      const cell = make("i", vision[row] ? "vision" : "text");
      cell.dataset.row = row;
      this.strip.append(cell);
    }
    this.strip.querySelector(".on")?.classList.remove("on");
    if (this.chosen >= 0) this.strip.children[this.chosen]?.classList.add("on");
    this.strip.setAttribute("aria-valuemin", "0");
    this.strip.setAttribute("aria-valuemax", String(rows.length - 1));
    this.strip.setAttribute("aria-valuenow", String(Math.max(0, this.chosen)));
    this.said.textContent = this.describe();
    this.strip.setAttribute("aria-valuetext", this.said.textContent);
    for (const bank of Object.keys(this.canvas)) this.paint(bank);
  }

  paint(bank) {
    const canvas = this.canvas[bank], { trace } = this, count = this.experts[bank];
    const uses = new Map();
    let most = 0;
    for (let row = 0; row < trace.rows.length; row += 1) {
      if (trace.vision[row] !== (bank === "vision")) continue;
      for (const [layer, ids] of trace.choices(row)) {
        for (const id of ids) {
          const place = layer * count + id, times = (uses.get(place) ?? 0) + 1;
          uses.set(place, times);
          most = Math.max(most, times);
        }
      }
    }
    const size = Math.max(5, Math.min(CELL, Math.floor(this.maps.clientWidth / count) - GAP)), step = size + GAP;
    const scale = window.devicePixelRatio || 1;
    canvas.width = count * step * scale;
    canvas.height = trace.layers * step * scale;
    canvas.style.width = `${count * step}px`;
    canvas.style.height = `${trace.layers * step}px`;
    canvas.setAttribute("aria-label", `${bank} experts: ${trace.layers} layers by ${count}, shaded by use`);
    const pen = canvas.getContext("2d"), style = getComputedStyle(this.node);
    pen.scale(scale, scale);
    for (let layer = 0; layer < trace.layers; layer += 1) {
      for (let id = 0; id < count; id += 1) {
        const share = (uses.get(layer * count + id) ?? 0) / (most || 1);
        pen.globalAlpha = 1;
        pen.fillStyle = style.getPropertyValue("--line");
        pen.fillRect(id * step, layer * step, size, size);
        pen.globalAlpha = Math.sqrt(share); // rare use stays visible
        pen.fillStyle = style.getPropertyValue(bank === "vision" ? "--vision" : "--accent");
        pen.fillRect(id * step, layer * step, size, size);
      }
    }
    pen.globalAlpha = 1;
    if (this.chosen < 0 || trace.vision[this.chosen] !== (bank === "vision") || !trace.rows[this.chosen]) return;
    pen.strokeStyle = style.getPropertyValue("--ink");
    pen.lineWidth = 2;
    for (const [layer, ids] of trace.choices(this.chosen)) {
      for (const id of ids) pen.strokeRect(id * step + 1, layer * step + 1, size - 2, size - 2);
    }
  }
}
