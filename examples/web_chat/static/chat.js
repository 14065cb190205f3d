// The browser's side of the chat: draws what comes, and keeps its WebSocket alive.

const $ = (id) => document.getElementById(id);
const scroll = $("scroll"), messages = $("messages"), text = $("text");

const SILENCE = 25_000; // the server says something every ten seconds, or is not there
const known = new Map(); // each message that is shown, by its id
const waiting = new Map(); // what we said, until it has come back
let name = "", socket = null, tries = 0, away = false, retry = 0, silence = 0;

// The connection

function connect() {
  clearTimeout(retry);
  drop();
  const url = new URL("chat", location.href);
  url.protocol = url.protocol.replace("http", "ws");
  url.search = new URLSearchParams({ name });
  socket = new WebSocket(url);
  socket.onopen = () => {
    tries = 0;
    for (const [id, said] of waiting) socket.send(id + said);
  };
  socket.onmessage = (event) => {
    listen();
    take(event.data);
  };
  socket.onclose = lost;
  listen();
}

// A lost link may take minutes to say so, and an old one must not speak for the new one.
function drop() {
  if (!socket) return;
  socket.onopen = socket.onmessage = socket.onclose = null;
  socket.close();
  socket = null;
}

function listen() {
  clearTimeout(silence);
  silence = setTimeout(lost, SILENCE);
}

function lost() {
  clearTimeout(silence);
  clearTimeout(retry);
  drop();
  away = true;
  if (!navigator.onLine) {
    say("lost", "Offline. Waiting for the network …");
    return;
  }
  say("lost", "Connection lost. Trying again …");
  const seconds = Math.min(10, 0.5 * 2 ** tries++);
  retry = setTimeout(connect, 1000 * seconds * (0.5 + Math.random() / 2));
}

function say(state, words) {
  document.body.classList.toggle("lost", state === "lost");
  $("status").dataset.state = state;
  if ($("status").textContent !== words) $("status").textContent = words;
}

addEventListener("offline", () => name && lost());
addEventListener("online", () => name && connect());
// A page that is kept for the way back is not there meanwhile.
addEventListener("pagehide", () => {
  clearTimeout(retry);
  clearTimeout(silence);
  drop();
});
addEventListener("pageshow", (event) => event.persisted && name && connect());

// What comes

function take(data) {
  let said;
  try {
    said = JSON.parse(data);
  } catch {
    return; // whoever has a key may publish anything
  }
  if (said && Array.isArray(said.people)) {
    showPeople(said.people.map(String));
    if (!said.live) say("lost", "The server has lost its broker. Trying again …");
    else say("connected", away ? "Connected again" : "Connected");
  } else if (said && typeof said.text === "string" && typeof said.id === "string") {
    show(said.id, String(said.name), said.text, Number(said.at) || 0);
  }
}

function make(tag, className, content) {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = content; // never as HTML
  return made;
}

function hue(name) {
  let sum = 7;
  for (const letter of name) sum = (sum * 31 + letter.codePointAt(0)) % 360;
  return sum;
}

function face(name) {
  const made = make("span", "face", ([...name][0] ?? "?").toUpperCase());
  made.ariaHidden = "true";
  return made;
}

function showPeople(names) {
  $("count").textContent = `(${names.length})`;
  $("people").replaceChildren(
    ...names.map((each) => {
      const item = make("li", "", "");
      item.style.setProperty("--hue", hue(each));
      item.append(face(each), make("span", each === name ? "you" : "", each));
      return item;
    }),
  );
}

function show(id, from, words, at, isWaiting = false) {
  if (!isWaiting) waiting.delete(id);
  const old = known.get(id);
  if (old && (isWaiting || !old.classList.contains("waiting"))) return; // it may come twice
  old?.remove();

  const atEnd = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 80;
  const item = make("li", "message", "");
  item.classList.toggle("mine", from === name);
  item.classList.toggle("waiting", isWaiting);
  item.style.setProperty("--hue", hue(from));
  item.at = isWaiting ? Infinity : at;
  item.from = from;
  const when = new Date(at * 1000);
  const time = make("time", "", isWaiting ? "sending …" : shortly(when));
  if (!isWaiting && !isNaN(when)) time.dateTime = when.toISOString();
  const head = make("header", "", "");
  head.append(make("b", "", from), time);
  item.append(head, face(from), make("p", "", words));

  // In the order of time, whatever the order in which the broker replays.
  let next = null;
  for (let last = messages.lastElementChild; last && last.at > item.at; last = last.previousElementSibling)
    next = last;
  messages.insertBefore(item, next);
  known.set(id, item);
  for (const each of [item, item.nextElementSibling]) group(each);
  $("empty").hidden = true;
  if (atEnd || from === name) toEnd();
  else $("newer").hidden = false;
}

function shortly(when) {
  return isNaN(when) ? "" : when.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
}

function group(item) {
  const before = item?.previousElementSibling;
  item?.classList.toggle("more", !!before && before.from === item.from && item.at - before.at < 120);
}

function toEnd() {
  scroll.scrollTop = scroll.scrollHeight;
  $("newer").hidden = true;
}

$("newer").onclick = toEnd;
scroll.onscroll = () => {
  if (scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 80) $("newer").hidden = true;
};

// What we say

$("composer").onsubmit = (event) => {
  event.preventDefault();
  const said = text.value.trim();
  if (!said) return;
  const id = [...crypto.getRandomValues(new Uint8Array(16))]
    .map((byte) => byte.toString(16).padStart(2, "0"))
    .join("");
  waiting.set(id, said);
  show(id, name, said, 0, true);
  if (socket?.readyState === WebSocket.OPEN) socket.send(id + said);
  text.value = "";
  text.focus();
};

text.onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("composer").requestSubmit();
};

// The way in

function join(as) {
  name = as;
  $("welcome").close();
  text.focus();
  connect();
}

$("join").onsubmit = (event) => {
  event.preventDefault();
  const as = $("name").value.trim().replace(/\s+/g, " ");
  if (!as) return;
  sessionStorage.setItem("name", as);
  join(as);
};
$("welcome").oncancel = (event) => event.preventDefault();

const before = sessionStorage.getItem("name");
if (before) join(before);
else $("welcome").showModal();
