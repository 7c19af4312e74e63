"use strict";

const $ = (id) => document.getElementById(id);
const state = { messages: [], picture: null, running: null };

// with an API key, open the page as /#key=...
const key = new URLSearchParams(location.hash.slice(1)).get("key");
const headers = { "Content-Type": "application/json", ...(key ? { Authorization: "Bearer " + key } : {}) };

function add(parent, tag, className, text) {
  const e = parent.appendChild(document.createElement(tag));
  e.className = className;
  if (text) e.textContent = text;
  return e;
}

function setPicture(url) {
  state.picture = url;
  $("preview").hidden = !url;
  if (url) $("preview").src = url; else $("preview").removeAttribute("src");
  $("hint").textContent = url ? "Another picture?" : "Drop a picture here, or choose one";
}

function readFile(file) {
  if (!file) return;
  const reader = new FileReader();
  reader.onload = () => setPicture(reader.result);
  reader.readAsDataURL(file);
}

// the events of a stream, as JSON
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const lines = text.split("\n");
    text = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

async function metrics() {
  const response = await fetch("metrics", { headers });
  if (!response.ok) return {};
  const found = {};
  for (const line of (await response.text()).split("\n")) {
    const m = line.match(/^llamacpp:(\w+) (\S+)$/);
    if (m) found[m[1]] = Number(m[2]);
  }
  return found;
}

async function showKept() {
  const m = await metrics();
  $("kept").textContent = m.kv_tokens
    ? `${m.kv_tokens} tokens read, ${m.kv_cells} cells kept (${Math.round(100 * m.kv_cells / m.kv_tokens)} %) in all conversations`
    : "";
}

async function answer(turn, signal) {
  const response = await fetch("v1/chat/completions", {
    method: "POST", headers, signal,
    body: JSON.stringify({ messages: state.messages, stream: true, temperature: 0, max_tokens: 512 }),
  });
  if (!response.ok) throw new Error((await response.json()).error.message);
  const out = add(turn, "p", "answer");
  const start = performance.now();
  let first = 0;
  for await (const event of events(response.body)) {
    if (event.error) throw new Error(event.error.message);
    const piece = event.choices?.[0]?.delta?.content;
    if (piece) {
      first = first || performance.now() - start;
      out.textContent += piece;
    }
    if (event.timings) {
      const t = event.timings;
      add(turn, "p", "note", `${t.prompt_n} tokens read, ${t.cache_n} reused · first word after ${(first / 1000).toFixed(1)} s · ` +
        `${t.predicted_per_second.toFixed(0)} tokens/s`);
    }
  }
  return out.textContent;
}

async function ask(question) {
  const content = state.picture
    ? [{ type: "image_url", image_url: { url: state.picture } }, { type: "text", text: question }]
    : question;
  const turn = add($("turns"), "div", "turn");
  if (state.picture) add(turn, "img", "").src = state.picture;
  add(turn, "p", "question", question);
  state.messages.push({ role: "user", content });
  setPicture(null);
  state.running = new AbortController();
  $("send").disabled = true;
  $("stop").hidden = false;
  try {
    state.messages.push({ role: "assistant", content: await answer(turn, state.running.signal) });
  } catch (e) {
    state.messages.pop();
    add(turn, "p", "error", e.name === "AbortError" ? "stopped" : e.message);
  }
  state.running = null;
  $("send").disabled = false;
  $("stop").hidden = true;
  await showKept();
  $("question").focus();
}

$("file").onchange = (e) => readFile(e.target.files[0]);
$("drop").ondragover = (e) => { e.preventDefault(); $("drop").classList.add("over"); };
$("drop").ondragleave = () => $("drop").classList.remove("over");
$("drop").ondrop = (e) => { e.preventDefault(); $("drop").classList.remove("over"); readFile(e.dataTransfer.files[0]); };
document.onpaste = (e) => readFile([...e.clipboardData.files][0]);
$("ask").onsubmit = (e) => {
  e.preventDefault();
  const question = $("question").value.trim();
  if (!question || state.running) return;
  $("question").value = "";
  ask(question);
};
$("stop").onclick = () => state.running?.abort();
$("new").onclick = () => {
  state.running?.abort();
  state.messages = [];
  setPicture(null);
  $("turns").replaceChildren();
};
showKept();
