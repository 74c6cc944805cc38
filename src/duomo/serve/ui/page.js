// The page's state and behaviour. Text reaches the document through textContent alone, so that no answer can
// become markup. The conversation lives in memory; only settings are remembered, and the key only for the tab.
import { ExpertView } from "./experts.js";
import { ask, control, models } from "./wire.js";

const $ = (id) => document.getElementById(id);
const turns = []; // {role, text, reasoning, media: [{kind, url}], node}
let pending = []; // media waiting to be sent
let running = null; // {abort, id}
let experts = null; // how many a layer of the model has, {text, vision}; null: a dense model

// ---- settings ----

const remembered = ["thinking", "budget", "longest", "temperature", "theme", "experts"];
for (const name of remembered) {
  $(name).value = localStorage.getItem(`duomo.${name}`) ?? $(name).value;
  $(name).addEventListener("change", () => {
    localStorage.setItem(`duomo.${name}`, $(name).value);
    paint();
  });
}
$("key").value = sessionStorage.getItem("duomo.key") ?? "";
$("key").addEventListener("change", () => {
  sessionStorage.setItem("duomo.key", $("key").value);
  greet();
});

function paint() {
  if ($("theme").value) document.documentElement.dataset.theme = $("theme").value;
  else delete document.documentElement.dataset.theme;
}

async function greet() {
  try {
    const [model] = await models($("key").value);
    experts = model.experts;
    $("experts").disabled = !experts;
    $("model").textContent = `${model.id} · ${model.max_model_len.toLocaleString()} tokens of context`;
    say("");
  } catch (error) {
    $("model").textContent = "not connected";
    say(error.message, true);
    if (error.status === 401) $("settings").open = true;
    if (error.status === 503) setTimeout(greet, 1500);
  }
}

function say(text, failed = false) {
  $("notice").textContent = text;
  $("notice").classList.toggle("failed", failed);
}

// ---- media ----

async function take(files) {
  for (const file of files) {
    const kind = file.type.split("/")[0];
    if (kind !== "image" && kind !== "video") {
      say(`${file.name} is neither a picture nor a video`, true);
      continue;
    }
    const url = await new Promise((done, failed) => {
      const reader = new FileReader();
      reader.onload = () => done(reader.result);
      reader.onerror = () => failed(reader.error);
      reader.readAsDataURL(file);
    });
    pending.push({ kind, url, name: file.name });
  }
  tray();
}

function tray() {
  $("tray").replaceChildren(...pending.map((medium, index) => {
    const chip = make("div", "chip");
    const remove = make("button", "", "×");
    remove.type = "button";
    remove.setAttribute("aria-label", `Remove ${medium.name}`);
    remove.addEventListener("click", () => {
      pending.splice(index, 1);
      tray();
      $("question").focus();
    });
    chip.append(shown(medium), remove);
    return chip;
  }));
}

function shown(medium) {
  const node = make(medium.kind === "image" ? "img" : "video", "");
  node.src = medium.url;
  if (medium.kind === "image") node.alt = medium.name || "a picture";
  else node.controls = true;
  return node;
}

// ---- the conversation ----

function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function button(text, act, title) {
  const node = make("button", "", text);
  node.type = "button";
  if (title) node.title = title;
  node.addEventListener("click", act);
  return node;
}

function addTurn(turn) {
  $("welcome").hidden = true;
  turn.node = make("article", `turn ${turn.role}`);
  turn.node.setAttribute("aria-label", turn.role === "user" ? "You" : "Answer");
  if (turn.media?.length) {
    const media = make("div", "media");
    media.append(...turn.media.map(shown));
    turn.node.append(media);
  }
  if (turn.role === "assistant") {
    turn.thoughts = make("details", "thoughts");
    turn.thoughtsTitle = make("summary", "", "Thinking…");
    turn.thoughtsText = make("div", "text");
    turn.thoughts.append(turn.thoughtsTitle, turn.thoughtsText);
    turn.thoughts.hidden = true;
    turn.node.append(turn.thoughts);
  }
  turn.textNode = make("div", "text", turn.text);
  turn.foot = make("div", "foot");
  turn.node.append(turn.textNode, turn.foot);
  if (turn.role === "user") turn.foot.append(button("Edit", () => edit(turn), "Change this question and ask again"));
  turns.push(turn);
  $("log").append(turn.node);
  follow(true);
}

function follow(always = false) {
  const log = $("log");
  if (always || log.scrollHeight - log.scrollTop - log.clientHeight < 120) log.scrollTop = log.scrollHeight;
}

function cutFrom(turn) {
  for (const gone of turns.splice(turns.indexOf(turn))) gone.node.remove();
  $("welcome").hidden = turns.length > 0;
}

function edit(turn) {
  if (running) return;
  cutFrom(turn);
  $("question").value = turn.text;
  pending = turn.media;
  tray();
  grow();
  $("question").focus();
}

function messages() {
  return turns.map((turn) => {
    if (turn.role === "assistant") return { role: "assistant", content: turn.text };
    const media = turn.media.map(({ kind, url }) => ({ type: `${kind}_url`, [`${kind}_url`]: { url } }));
    return { role: "user", content: media.length ? [...media, { type: "text", text: turn.text }] : turn.text };
  });
}

function wishes() {
  const body = { thinking: $("thinking").value };
  if ($("budget").value && body.thinking !== "off") body.thinking_budget = Number($("budget").value);
  if ($("longest").value) body.max_completion_tokens = Number($("longest").value);
  if ($("temperature").value) body.temperature = Number($("temperature").value);
  if (experts && $("experts").value) body.return_experts = true;
  return body;
}

async function answer() {
  const body = { messages: messages(), stream: true, stream_options: { include_usage: true }, ...wishes() };
  const turn = { role: "assistant", text: "", reasoning: "" };
  addTurn(turn);
  turn.textNode.classList.add("waiting");
  running = { abort: new AbortController(), id: null };
  busy(true);
  const clock = { start: performance.now(), first: 0 };
  let usage = null, finish = null, failure = null;
  try {
    for await (const event of ask(body, $("key").value, running.abort.signal)) {
      running.id = event.id;
      usage = event.usage ?? usage;
      const choice = event.choices[0];
      if (!choice) continue;
      finish = choice.finish_reason ?? finish;
      const { content, reasoning_content: thought } = choice.delta;
      if ((content || thought) && !clock.first) clock.first = performance.now();
      if (thought) think(turn, thought, body.thinking_budget);
      const word = content || thought ? make("span", "token", content || thought) : null;
      if (choice.experts) route(turn, choice.experts, content || thought || "", word);
      if (thought) turn.thoughtsText.append(choice.experts ? word : thought);
      if (content) {
        if (!turn.text) $("now").hidden = true;
        turn.text += content;
        turn.textNode.append(choice.experts ? word : content);
      }
      follow();
    }
  } catch (error) {
    failure = error.name === "AbortError" ? "stopped" : error.message;
  }
  turn.textNode.classList.remove("waiting");
  close(turn, { usage, finish, failure, clock });
  running = null;
  busy(false);
  $("question").focus();
}

function think(turn, thought, budget) {
  turn.thoughts.hidden = false;
  $("now").hidden = false;
  turn.reasoning += thought;
  turn.pieces = (turn.pieces ?? 0) + 1;
  turn.thoughtsTitle.textContent = `Thinking… ${turn.pieces}${budget ? ` of at most ${budget}` : ""}`;
}

/** The experts of one piece go to the answer's own view, made when the first ones come. */
function route(turn, part, text, word) {
  if (!turn.view) {
    turn.view = new ExpertView(experts);
    turn.view.node.open = true;
    turn.textNode.after(turn.view.node);
  }
  turn.view.add(part, text, word);
}

function close(turn, { usage, finish, failure, clock }) {
  if (turn.reasoning) {
    const spent = usage?.completion_tokens_details.reasoning_tokens ?? turn.pieces;
    turn.thoughtsTitle.textContent = `Thought for ${spent} tokens`;
  }
  if (failure) turn.foot.append(make("span", failure === "stopped" ? "numbers" : "failed", failure));
  if (usage) {
    const seconds = (performance.now() - clock.start) / 1000;
    const writing = (performance.now() - clock.first) / 1000;
    const speed = usage.completion_tokens > 1 ? ((usage.completion_tokens - 1) / writing).toFixed(1) : "–";
    const pictures = usage.prompt_tokens_details.image_tokens + usage.prompt_tokens_details.video_tokens;
    const asked = `${usage.prompt_tokens}${pictures ? ` (${pictures} of pictures)` : ""}`;
    const wait = ((clock.first - clock.start) / 1000).toFixed(2);
    turn.foot.append(make("span", "numbers",
      `${asked} → ${usage.completion_tokens} tokens · ${seconds.toFixed(1)} s (first after ${wait} s) · ${speed} tokens/s`));
  }
  if (finish === "length") turn.foot.append(make("span", "numbers", "cut at the longest length"));
  turn.foot.append(
    button("Copy", async (event) => {
      await copy(turn.text);
      event.target.textContent = "Copied";
      setTimeout(() => { event.target.textContent = "Copy"; }, 1200);
    }),
    button("Ask again", () => {
      if (running) return;
      cutFrom(turn);
      answer();
    }, "Answer the same question once more"),
  );
  follow();
}

async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = make("textarea", "sr", text); // an address without TLS has no clipboard
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

function busy(is) {
  $("send").hidden = is;
  $("stop").hidden = !is;
  $("now").hidden = true;
  $("log").setAttribute("aria-busy", String(is));
  say(is ? "answering" : "");
}

// ---- what people do ----

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("question").value.trim();
  if (running || (!text && !pending.length)) return;
  addTurn({ role: "user", text, media: pending });
  pending = [];
  tray();
  $("question").value = "";
  grow();
  answer();
});
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});
$("question").addEventListener("input", grow);
function grow() {
  const area = $("question");
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + 2}px`;
}
$("stop").addEventListener("click", () => running?.abort.abort());
$("now").addEventListener("click", () => {
  if (running?.id) control(running.id, "answer_now", $("key").value).catch((error) => say(error.message, true));
});
$("fresh").addEventListener("click", () => {
  running?.abort.abort();
  if (turns.length) cutFrom(turns[0]);
  $("question").focus();
});
$("files").addEventListener("change", (event) => {
  take(event.target.files);
  event.target.value = "";
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    $("settings").open = false;
    running?.abort.abort();
  }
  if (event.altKey && event.key.toLowerCase() === "n") $("fresh").click();
});
document.addEventListener("paste", (event) => {
  if (event.clipboardData?.files.length) take(event.clipboardData.files);
});
let depth = 0; // dragenter and dragleave come for every child
document.addEventListener("dragenter", (event) => {
  event.preventDefault();
  depth += 1;
  $("drop").hidden = false;
});
document.addEventListener("dragleave", () => {
  depth -= 1;
  if (depth <= 0) $("drop").hidden = true;
});
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  depth = 0;
  $("drop").hidden = true;
  take(event.dataTransfer.files);
});

paint();
greet();
$("question").focus();
