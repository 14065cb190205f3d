// The browser's side of the chat: shows messages and members, and keeps a WebSocket open.

const $ = (id) => document.getElementById(id);
const scroll = $("scroll"), messages = $("messages"), text = $("text");

const SILENCE_MS = 25_000; // the server sends something every 10 s
const shown = new Map(); // the list items of all messages, by message id
const unconfirmed = new Map(); // sent messages that the server has not sent back, by id
let name = "", socket = null, tries = 0, wasLost = false, retryTimer = 0, silenceTimer = 0;

// The connection

function connect() {
  clearTimeout(retryTimer);
  disconnect();
  const url = new URL("chat", location.href);
  url.protocol = url.protocol.replace("http", "ws");
  url.search = new URLSearchParams({ name });
  socket = new WebSocket(url);
  socket.onopen = () => {
    tries = 0;
    for (const [id, content] of unconfirmed) socket.send(id + content);
  };
  socket.onmessage = (event) => {
    restartSilenceTimer();
    receive(event.data);
  };
  socket.onclose = reconnect;
  restartSilenceTimer();
}

// Remove the handlers first: a lost connection may take minutes to close, and its event must not
// affect the next connection.
function disconnect() {
  if (!socket) return;
  socket.onopen = socket.onmessage = socket.onclose = null;
  socket.close();
  socket = null;
}

function restartSilenceTimer() {
  clearTimeout(silenceTimer);
  silenceTimer = setTimeout(reconnect, SILENCE_MS);
}

function reconnect() {
  clearTimeout(silenceTimer);
  clearTimeout(retryTimer);
  disconnect();
  wasLost = true;
  if (!navigator.onLine) {
    showStatus("lost", "Offline. Waiting for the network …");
    return;
  }
  showStatus("lost", "Connection lost. Reconnecting …");
  const seconds = Math.min(10, 0.5 * 2 ** tries++);
  retryTimer = setTimeout(connect, 1000 * seconds * (0.5 + Math.random() / 2));
}

function showStatus(state, words) {
  document.body.classList.toggle("lost", state === "lost");
  $("status").dataset.state = state;
  if ($("status").textContent !== words) $("status").textContent = words;
}

addEventListener("offline", () => name && reconnect());
addEventListener("online", () => name && connect());
// The browser may keep a hidden page for its "back" button. The user is not in the chat then.
addEventListener("pagehide", () => {
  clearTimeout(retryTimer);
  clearTimeout(silenceTimer);
  disconnect();
});
addEventListener("pageshow", (event) => event.persisted && name && connect());

// Received data

function receive(data) {
  let received;
  try {
    received = JSON.parse(data);
  } catch {
    return; // anyone with a key can publish any bytes
  }
  if (received && Array.isArray(received.people)) {
    showPeople(received.people.map(String));
    if (!received.live) showStatus("lost", "The server has lost its broker. Reconnecting …");
    else showStatus("connected", wasLost ? "Reconnected" : "Connected");
  } else if (received && typeof received.text === "string" && typeof received.id === "string") {
    showMessage(received.id, String(received.name), received.text, Number(received.at) || 0);
  }
}

function element(tag, className, content) {
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

function avatar(name) {
  const made = element("span", "avatar", ([...name][0] ?? "?").toUpperCase());
  made.ariaHidden = "true";
  return made;
}

function showPeople(names) {
  $("count").textContent = `(${names.length})`;
  $("people").replaceChildren(
    ...names.map((each) => {
      const item = element("li", "", "");
      item.style.setProperty("--hue", hue(each));
      item.append(avatar(each), element("span", each === name ? "you" : "", each));
      return item;
    }),
  );
}

function showMessage(id, from, content, at, sending = false) {
  if (!sending) unconfirmed.delete(id);
  const old = shown.get(id);
  if (old && (sending || !old.classList.contains("sending"))) return; // replayed messages repeat
  old?.remove();

  const atEnd = isAtEnd();
  const item = element("li", "message", "");
  item.classList.toggle("mine", from === name);
  item.classList.toggle("sending", sending);
  item.style.setProperty("--hue", hue(from));
  item.at = sending ? Infinity : at;
  item.from = from;
  const when = new Date(at * 1000);
  const time = element("time", "", sending ? "sending …" : formatTime(when));
  if (!sending && !isNaN(when)) time.dateTime = when.toISOString();
  const head = element("header", "", "");
  head.append(element("b", "", from), time);
  item.append(head, avatar(from), element("p", "", content));

  // Sort by time, because the broker replays stored messages in another order.
  let next = null;
  for (let last = messages.lastElementChild; last && last.at > item.at; last = last.previousElementSibling)
    next = last;
  messages.insertBefore(item, next);
  shown.set(id, item);
  for (const each of [item, item.nextElementSibling]) groupWithPrevious(each);
  $("empty").hidden = true;
  if (atEnd || from === name) scrollToEnd();
  else $("newer").hidden = false;
}

function formatTime(when) {
  return isNaN(when) ? "" : when.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
}

function groupWithPrevious(item) {
  const previous = item?.previousElementSibling;
  const grouped = !!previous && previous.from === item.from && item.at - previous.at < 120;
  item?.classList.toggle("grouped", grouped);
}

function isAtEnd() {
  return scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 80;
}

function scrollToEnd() {
  scroll.scrollTop = scroll.scrollHeight;
  $("newer").hidden = true;
}

$("newer").onclick = scrollToEnd;
scroll.onscroll = () => {
  if (isAtEnd()) $("newer").hidden = true;
};

// Sending

$("composer").onsubmit = (event) => {
  event.preventDefault();
  const content = text.value.trim();
  if (!content) return;
  const id = [...crypto.getRandomValues(new Uint8Array(16))]
    .map((byte) => byte.toString(16).padStart(2, "0"))
    .join("");
  unconfirmed.set(id, content);
  showMessage(id, name, content, 0, true);
  if (socket?.readyState === WebSocket.OPEN) socket.send(id + content);
  text.value = "";
  text.focus();
};

text.onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("composer").requestSubmit();
};

// Joining

function join(chosenName) {
  name = chosenName;
  $("welcome").close();
  text.focus();
  connect();
}

$("join").onsubmit = (event) => {
  event.preventDefault();
  const chosenName = $("name").value.trim().replace(/\s+/g, " ");
  if (!chosenName) return;
  sessionStorage.setItem("name", chosenName);
  join(chosenName);
};
$("welcome").oncancel = (event) => event.preventDefault();

const savedName = sessionStorage.getItem("name");
if (savedName) join(savedName);
else $("welcome").showModal();
