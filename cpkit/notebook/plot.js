// The page's part of plot.py: draws the figure that the kernel published most recently.

const KERNEL_LOST = ["restarting", "autorestarting", "terminating", "dead"];
const LOST_TEXT = "The kernel was restarted or has ended: run this cell again.";
const REPLACED_MS = 200; // how long a figure that will probably be replaced soon is not drawn
const TOUCHES = ["pointerdown", "keydown", "wheel"];
const TOUCH_INTERVAL_MS = 1000; // at most one report of a touch in this time
const PRINT_INK = "#24292f"; // style.INK: lines and text of a figure on white paper

// Load Plotly once per page and version.
function loadPlotly(library) {
  const key = `cpkit-plotly-${library.get("version")}`;
  globalThis[key] ??= unpack(library.get("gzip")).catch((error) => {
    delete globalThis[key]; // the next view tries again
    throw error;
  });
  // Empty the model, so that saved notebooks do not contain the library.
  return globalThis[key].then((Plotly) => {
    library.set("gzip", new DataView(new ArrayBuffer(0)));
    return Plotly;
  });
}

async function unpack(compressed) {
  const stream = new Blob([compressed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = new Blob([await new Response(stream).blob()], { type: "text/javascript" });
  const url = URL.createObjectURL(script);
  const others = globalThis.Plotly;
  await import(url);
  URL.revokeObjectURL(url);
  const loaded = globalThis.Plotly;
  globalThis.Plotly = others;
  return loaded;
}

// All views of a page together draw at most two thirds of the time, so that the controls of a slow
// page still respond.
function rest(ms) {
  globalThis.cpkitRestUntil = performance.now() + ms;
}

function restMs() {
  return (globalThis.cpkitRestUntil ?? 0) - performance.now();
}

// The figure in the colours of the page's theme: its template is the only place that has others.
function themed({ data, layout }, element) {
  const css = getComputedStyle(element);
  const color = (name, otherwise) => css.getPropertyValue(name).trim() || otherwise;
  const look = layout.template.layout;
  look.paper_bgcolor = look.plot_bgcolor = color("--jp-layout-color0", "#ffffff");
  look.font.color = color("--jp-content-font-color1", PRINT_INK);
  look.title.subtitle.font.color = color("--jp-content-font-color2", "#57606a");
  const faint = color("--jp-border-color2", "#d0d7de");
  for (const axis of [look.xaxis, look.yaxis]) {
    Object.assign(axis, { gridcolor: faint, linecolor: faint, tickcolor: faint });
  }
  const inked = ({ line, error_x, error_y, marker }) =>
    [line, error_x, error_y, marker, marker?.line];
  for (const part of data.flatMap(inked)) {
    if (part?.color === PRINT_INK) part.color = look.font.color;
  }
  return { data, layout };
}

// ipywidgets leave sliders without a name and without the text of their value, and toggle buttons
// without their state. JupyterLab takes the arrow keys of a dropdown for a move to the next cell.
// A live region must exist before its text changes.
function describeControls(panel) {
  for (const slider of panel.querySelectorAll(".widget-slider")) {
    const handle = slider.querySelector("[role=slider]");
    const readout = slider.querySelector(".widget-readout");
    handle?.setAttribute("aria-label", slider.querySelector(".widget-label")?.textContent ?? "");
    handle?.setAttribute("aria-valuetext", readout?.textContent ?? "");
    readout?.setAttribute("contenteditable", "false"); // the options are not typed
  }
  for (const choice of panel.querySelectorAll("select")) {
    choice.setAttribute("data-lm-suppress-shortcuts", "true");
  }
  for (const button of panel.querySelectorAll(".widget-toggle-button")) {
    button.setAttribute("aria-pressed", button.classList.contains("mod-active"));
  }
  for (const icon of panel.querySelectorAll("button > i")) icon.setAttribute("aria-hidden", "true");
  for (const text of panel.querySelectorAll(".cpkit-status, .cpkit-spoken")) {
    text.setAttribute("role", "status"); // a polite live region
  }
}

// Store a text in a file of the user, or in the clipboard, or the figure in a file; once, however
// many views there are.
async function take({ number, name, text }, state, savePicture) {
  if (!document.hasFocus() || state.cpkitTaken === number) return;
  state.cpkitTaken = number;
  if (text === undefined) return savePicture(...name.split("."));
  if (!name) return navigator.clipboard.writeText(text);
  const url = URL.createObjectURL(new Blob([text]));
  Object.assign(document.createElement("a"), { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

async function render({ model, el }) {
  const child = (name) =>
    model.widget_manager.get_model(model.get(name).replace("IPY_MODEL_", ""));
  const [state, library] = await Promise.all([child("plot_state"), child("plotly_library")]);
  const notice = document.createElement("div");
  notice.setAttribute("role", "status");
  const plot = document.createElement("div");
  plot.setAttribute("role", "figure"); // not "img", which hides its buttons
  plot.style.overflow = "hidden"; // otherwise a wide drawing prevents its container from shrinking
  el.style.minWidth = 0;
  el.append(notice, plot);

  let Plotly, timer, drawnWidth, drawing = false, closed = false, isLost = false;
  let inView = true, stale = true;
  // Draw quick changes once, with the newest figure, and one that will be replaced soon only if it
  // is not. A view that is scrolled away keeps its last drawing; it is never without one.
  const request = () => {
    stale = true;
    clearTimeout(timer);
    timer = undefined;
    if (!inView && plot.dataset.revision) return;
    const patience = JSON.parse(state.get("figure")).replaced_soon ? REPLACED_MS : 0;
    timer = setTimeout(drawInTurn, Math.max(restMs(), patience));
  };
  const drawInTurn = () => {
    if (restMs() > 0) request(); // another view has drawn meanwhile
    else draw();
  };
  // A touch changes the setting: figures that wait show the old one, and drawing them would delay
  // the new one.
  const postpone = () => {
    rest(0);
    if (timer === undefined) return;
    clearTimeout(timer);
    timer = setTimeout(drawInTurn, REPLACED_MS);
  };
  async function draw() {
    timer = undefined;
    if (closed || drawing || !Plotly) return;
    drawing = true;
    stale = false;
    const startedAt = performance.now();
    const figure = JSON.parse(state.get("figure"));
    const { data, layout } = themed(figure, el);
    drawnWidth = el.clientWidth;
    layout.width = drawnWidth || layout.width;
    try {
      await Plotly.react(plot, data, layout, figure.config);
      plot.setAttribute("aria-label", figure.alt);
      plot.dataset.revision = figure.revision;
      if (!isLost) notice.textContent = "";
    } catch (error) {
      notice.textContent = `The plot could not be drawn: ${error}`;
    }
    describeControls(el.closest(".cpkit-live") ?? el);
    drawing = false;
    rest((performance.now() - startedAt) / 2);
    const newest = JSON.parse(state.get("figure")).revision;
    if (newest !== figure.revision || el.clientWidth !== drawnWidth) request();
  }

  const viewId = `${Date.now()}-${Math.random()}`;
  // A dead kernel takes no report; `lost` already says so.
  const report = (content) => {
    if (state.comm_live) state.send({ view: viewId, ...content });
  };
  const reportVisible = () => report({ visible: document.visibilityState === "visible" });
  const reportGone = () => report({ visible: false });
  let touchedAt = -Infinity;
  const onTouch = ({ target, type }) => {
    if (!el.closest(".cpkit-live")?.contains(target)) return;
    if (type !== "wheel") postpone();
    if (performance.now() - touchedAt < TOUCH_INTERVAL_MS) return;
    touchedAt = performance.now();
    report({ touched: true });
  };
  const savePicture = async (filename, format) => {
    if (stale) await draw();
    const { width, height } = plot.layout;
    return Plotly.downloadImage(plot, { filename, format, width, height });
  };
  const onMessage = (content) => content.take
    && take(content.take, state, savePicture).catch((error) => {
      notice.textContent = `The browser does not take it: ${error}`;
    });
  state.on("msg:custom", onMessage);
  document.addEventListener("visibilitychange", reportVisible);
  globalThis.addEventListener("pagehide", reportGone);
  for (const touch of TOUCHES) document.addEventListener(touch, onTouch, { passive: true });
  reportVisible();

  const lost = () => {
    isLost = true;
    notice.textContent = LOST_TEXT;
    const panel = el.closest(".cpkit-live") ?? el;
    panel.classList.add("cpkit-lost");
    for (const line of panel.querySelectorAll(".cpkit-status")) line.textContent = "○ no kernel";
    for (const controls of panel.querySelectorAll(".cpkit-controls")) controls.inert = true;
  };
  const onComm = () => state.comm_live || lost();
  const kernel = model.widget_manager.context?.sessionContext; // JupyterLab's
  const onKernel = (_, status) => KERNEL_LOST.includes(status) && lost();
  state.on("change:figure", request);
  state.on("comm_live_update", onComm);
  kernel?.statusChanged.connect(onKernel);
  onComm();
  const resized = new ResizeObserver(() => el.clientWidth !== drawnWidth && request());
  resized.observe(el);
  const scrolled = new IntersectionObserver((entries) => {
    inView = entries.at(-1).isIntersecting; // the newest of those that arrive together
    if (inView && stale) request();
  });
  scrolled.observe(el);
  const theme = new MutationObserver(request);
  theme.observe(document.body, { attributeFilter: ["data-jp-theme-name"] });
  loadPlotly(library).then(
    (loaded) => { Plotly = loaded; request(); },
    (error) => { notice.textContent = `plotly.js could not be loaded: ${error}`; },
  );

  return () => {
    closed = true;
    reportGone();
    document.removeEventListener("visibilitychange", reportVisible);
    globalThis.removeEventListener("pagehide", reportGone);
    for (const touch of TOUCHES) document.removeEventListener(touch, onTouch);
    state.off("change:figure", request);
    state.off("comm_live_update", onComm);
    state.off("msg:custom", onMessage);
    kernel?.statusChanged.disconnect(onKernel);
    resized.disconnect();
    scrolled.disconnect();
    theme.disconnect();
    Plotly?.purge(plot);
  };
}

export default { render };
