// What all views share: a root with its keys and help, requests and their answers. Colours and heat
// maps are in heat.js.
//
// A view's own file follows this one in the same module and ends with
//   export default { render: (context) => mount(context, build) }
// where build(ui) fills ui.root. No text of a token is ever parsed as HTML: node() makes text nodes.

const QUIET = 8000; // milliseconds without a word from the kernel before the view says so

// ---- elements

// An element, "svg:" before the tag for SVG; strings among the children become text nodes.
function node(tag, attrs = {}, ...children) {
  const element = tag.startsWith("svg:")
    ? document.createElementNS("http://www.w3.org/2000/svg", tag.slice(4))
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attrs ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "dataset") Object.assign(element.dataset, value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== false));
  return element;
}

// ---- requests

// Requests to the kernel. In one channel one request is on its way at a time and only the latest of
// the others waits; whatever was overtaken is dropped when it comes. Answers hold Uint8Arrays.
class Requests {
  constructor(model, notice) {
    this.model = model;
    this.notice = notice; // (text or null): the kernel keeps silent
    this.sent = new Map(); // id -> request
    this.lanes = new Map(); // channel -> {running, waiting}
    this.next = Math.floor(Math.random() * 2 ** 40); // several pages may share one kernel
    this.receive = (message, buffers) => this.received(message, buffers ?? []);
    model.on("msg:custom", this.receive);
    this.timer = setInterval(() => this.look(), 2000);
    this.heard = performance.now();
  }

  ask(kind, fields = {}, { channel = null, progress = null } = {}) {
    return new Promise((resolve, reject) => {
      const request = { kind, fields, channel, progress, resolve, reject, stale: false };
      const lane = this.lanes.get(channel);
      if (channel === null || !lane) return this.send(request);
      lane.running.stale = true;
      if (lane.running.progress) this.cancel(channel);
      lane.waiting = request;
    });
  }

  send(request) {
    request.id = this.next++;
    if (this.sent.size === 0) this.heard = performance.now();
    this.sent.set(request.id, request);
    if (request.channel !== null) this.lanes.set(request.channel, { running: request });
    this.post(request.id, request.kind, request.fields);
  }

  post(id, kind, fields) {
    try {
      this.model.send({ id, kind, fields });
    } catch (error) {
      this.notice(`The kernel cannot be reached (${error.message}): run this cell again.`);
    }
  }

  // Asks Python to stop what runs in a channel; its answer, what is done so far, still comes.
  cancel(channel) {
    const running = this.lanes.get(channel)?.running;
    if (running) this.post(this.next++, "cancel", { id: running.id });
  }

  received(message, buffers) {
    const request = this.sent.get(message.id);
    this.heard = performance.now();
    this.notice(null);
    if (!request) return;
    const arrays = buffers.map((b) => new Uint8Array(b.buffer ?? b, b.byteOffset ?? 0, b.byteLength));
    if (message.progress !== undefined) {
      if (!request.stale) request.progress?.(message.progress, arrays);
      return;
    }
    this.sent.delete(message.id);
    const waiting = this.lanes.get(request.channel)?.waiting;
    this.lanes.delete(request.channel);
    if (waiting) this.send(waiting);
    if (request.stale) return;
    if (message.error === undefined) request.resolve({ content: message.content, buffers: arrays });
    else request.reject(new Error(message.error));
  }

  // A slow request says nothing for long: a ping tells whether the kernel is still there.
  look() {
    if (this.sent.size === 0) return;
    const quiet = performance.now() - this.heard;
    if (quiet > QUIET) {
      this.notice(`No word from the kernel for ${Math.round(quiet / 1000)} s. It is busy, or was ` +
        "restarted: then run this cell again.");
    }
    this.post(this.next++, "ping", {});
  }

  close() {
    clearInterval(this.timer);
    this.model.off("msg:custom", this.receive);
    this.sent.clear();
    this.lanes.clear();
  }
}

// ---- the shell around a view

function mount({ model, el }, build) {
  const first = model.get("first");
  const cleanups = [], bindings = new Map(), controller = new AbortController();
  const body = node("div", { class: "g4-body" });
  const status = node("span", { role: "status", class: "g4-status" });
  const error = node("div", { role: "alert", class: "g4-error", hidden: true });
  const silence = node("div", { role: "alert", class: "g4-error", hidden: true });
  const help = node("dl", { class: "g4-help", hidden: true });
  const helper = node("button", { type: "button", class: "g4-button", "aria-expanded": "false",
    title: "Keys (?)", "aria-label": "Keys" }, "?");
  const foot = node("div", { class: "g4-foot" }, status, node("span", { class: "g4-exports" }), helper);
  const outer = node("section",
    { class: "g4lens", tabindex: 0, role: "application", "aria-label": first.title },
    body, silence, error, foot, help);
  el.append(outer);

  const show = (element, text) => { element.textContent = text ?? ""; element.hidden = !text; };
  let blamed = null; // the channel, or kind, of the request whose error is shown
  const fail = (problem, asked = null) => {
    if (!problem.shown) {
      show(error, problem.message);
      blamed = asked;
    }
    problem.shown = true;
  };
  const requests = new Requests(model, (text) => show(silence, text));
  // Runs a handler; what it throws, now or later, is shown.
  const safely = (fn) => (...args) => {
    try {
      return Promise.resolve(fn(...args)).catch((problem) => fail(problem));
    } catch (problem) {
      fail(problem);
    }
  };
  const listen = (target, event, fn, options = {}) =>
    target.addEventListener(event, safely(fn), { ...options, signal: controller.signal });

  const ui = {
    first, root: body, listen, node, palette, rgb, value,
    isFile: Boolean(model.get("is_file")),
    // An error goes when the same is asked again, not when something else is.
    ask(kind, fields, options) {
      const asked = options?.channel ?? kind;
      if (blamed === null || blamed === asked) show(error, null);
      const answer = requests.ask(kind, fields, options);
      answer.catch((problem) => fail(problem, asked));
      return answer;
    },
    cancel: (channel) => requests.cancel(channel),
    say: (text) => { status.textContent = text; },
    fail: (text) => fail({ message: text }),
    onCleanup: (fn) => cleanups.push(fn),
    // Is there an answer? In a file only for what was exported; a kernel may be asked anything.
    holds: (kind, fields) => model.holds?.(kind, fields) ?? true,
    // What is selected, where Python sees it as `view.selection` and may set it.
    share(selection) {
      model.set("selection", selection);
      model.save_changes();
    },
    selected: () => model.get("selection") ?? {},
    onShared(fn) {
      const changed = safely(() => fn(model.get("selection")));
      model.on("change:selection", changed);
      cleanups.push(() => model.off("change:selection", changed));
    },
    keys: (more) => {
      for (const [key, binding] of Object.entries(more)) bindings.set(key, binding);
      fillHelp(help, bindings);
    },
    heat: (canvas, bytes, rows, columns, options) => heat(ui, canvas, bytes, rows, columns, options),
    button: (text, title, fn) => button(ui, text, title, fn),
    select: (label, options, chosen, onChange) => select(ui, label, options, chosen, onChange),
    exports: (selection) => exporters(ui, foot.querySelector(".g4-exports"), selection),
  };

  // Else a and b insert cells, and arrows are swallowed; Ctrl+S and its like stay Jupyter's. It looks
  // at what has the focus, on its way down the document: the window comes before it.
  const keep = ({ target, ctrlKey, metaKey }) => {
    if (!outer.contains(target)) return;
    for (const { dataset } of [outer, target]) {
      if (ctrlKey || metaKey) delete dataset.lmSuppressShortcuts;
      else dataset.lmSuppressShortcuts = "true";
    }
  };
  listen(window, "keydown", keep, { capture: true });

  const toggle = () => {
    help.hidden = !help.hidden;
    helper.setAttribute("aria-expanded", String(!help.hidden));
  };
  listen(helper, "click", toggle);
  ui.keys({ "?": [toggle, "show or hide these keys"] });
  listen(outer, "keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest("select, input, textarea")) return;
    if (event.target.closest("button") && [" ", "Enter"].includes(event.key)) return;
    const binding = bindings.get(event.key);
    if (!binding) return;
    event.preventDefault();
    event.stopPropagation();
    return binding[0](event);
  });
  safely(() => build(ui))();

  return () => {
    controller.abort();
    requests.close();
    cleanups.forEach((fn) => fn());
    outer.remove();
  };
}

const KEY_NAMES = { ArrowLeft: "\u2190", ArrowRight: "\u2192", ArrowUp: "\u2191", ArrowDown: "\u2193",
  " ": "Space" };

// One line for each thing that keys do, keys of one text together.
function fillHelp(help, bindings) {
  const lines = new Map();
  for (const [key, [, text]] of bindings) {
    lines.set(text, [...(lines.get(text) ?? []), node("kbd", {}, KEY_NAMES[key] ?? key)]);
  }
  help.replaceChildren(...[...lines].map(([text, keys]) =>
    node("div", {}, node("dt", {}, ...keys), node("dd", {}, text))));
}

function button(ui, text, title, fn) {
  const made = node("button", { type: "button", class: "g4-button", title }, text);
  ui.listen(made, "click", fn);
  return made;
}

// A labelled list to choose from; options are values or [value, text]. `.choose(value)` sets it
// without calling onChange.
function select(ui, label, options, chosen, onChange) {
  const pairs = options.map((option) => (Array.isArray(option) ? option : [option, String(option)]));
  const list = node("select", { class: "g4-select" },
    pairs.map(([, text], index) => node("option", { value: index }, text)));
  const made = node("label", { class: "g4-label" }, node("span", {}, label), list);
  made.choose = (wanted) => { list.selectedIndex = pairs.findIndex(([v]) => v === wanted); };
  made.choose(chosen);
  ui.listen(list, "change", () => onChange(pairs[list.selectedIndex][0]));
  return made;
}

// Buttons that save the view as it stands; `selection()` tells Python what to draw.
function exporters(ui, place, selection) {
  if (ui.isFile) return;
  for (const [format, type] of [["svg", "image/svg+xml"], ["png", "image/png"]]) {
    place.append(button(ui, format.toUpperCase(), `Save this view as ${format.toUpperCase()}`,
      async () => {
        const { buffers } = await ui.ask("snapshot", { format, ...selection() });
        const url = URL.createObjectURL(new Blob([buffers[0]], { type }));
        node("a", { href: url, download: `${ui.first.title}.${format}` }).click();
        URL.revokeObjectURL(url);
      }));
  }
}
