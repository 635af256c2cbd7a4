"Notebooks in a real browser: JupyterLab and Voilà servers of a test's own, one Chromium, and what a reader does to widgets."
import contextlib
import importlib.util
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import pytest

CHROMES = 'chromium', 'chromium-browser', 'google-chrome'
FLAGS = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
         '--disable-component-update', '--disable-sync']
WAIT = 60  # seconds that a page may take; a loaded machine needs many of them
LAB_SETTINGS = {
    # a windowed notebook leaves cells that are out of sight out of the page
    '@jupyterlab/notebook-extension:tracker': {'windowingMode': 'none'},
    # the notebook under test stays as it is on disk
    '@jupyterlab/docmanager-extension:plugin': {'autosave': False},
    '@jupyterlab/apputils-extension:notification': {'fetchNews': 'false', 'checkForUpdates': False, 'doNotDisturbMode': True},
}
# Voilà's front end fits not every extension that JupyterLab has: those it needs, lest the others fill the console with errors
WIDGETS = '@jupyter-widgets/jupyterlab-manager', '@voila-dashboards/widgets-manager8'
# both front ends show an error as they show a warning: what sets it apart is its text
STDERR = '[data-mime-type="application/vnd.jupyter.stderr"]'
ERROR = re.compile(r'^Traceback|\bTraceback \(most recent|^([\w.]+\.)?\w+(Error|Exception|Interrupt)\b|^There was an error when exec|'
                   r'^An exception occurred at the server', re.M)


# ---- servers ----

@dataclass
class Server:
    "A server that answers at url, with a token."
    url: str
    token: str
    log: Path

    def at(self, path, **query):
        query = '&'.join(f'{k}={v}' if v else k for k, v in dict(token=self.token, **query).items())
        return f'{self.url}{path}?{query}'


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def stop(process):
    "End a server and its kernels, which lead process groups of their own."
    import psutil
    try: family = [me := psutil.Process(process.pid), *me.children(recursive=True)]
    except psutil.NoSuchProcess: family = []
    with contextlib.suppress(ProcessLookupError): process.terminate()
    try: process.wait(10)
    except subprocess.TimeoutExpired: pass
    for p in psutil.wait_procs(family, timeout=3)[1]:
        with contextlib.suppress(psutil.NoSuchProcess): p.kill()
    process.wait(10)


@contextlib.contextmanager
def serving(module, arguments, cwd, env=None, settings=None):
    "`python -m module arguments` with configuration, data and runtime folders of its own; kernels and extensions are the environment's."
    if importlib.util.find_spec(module) is None: pytest.skip(f'{module} is not installed')
    port, token = free_port(), secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix='browser-', ignore_cleanup_errors=True) as home:
        home = Path(home)
        if settings:
            (home/'config'/'labconfig').mkdir(parents=True)
            (home/'config'/'labconfig'/'default_setting_overrides.json').write_text(json.dumps(settings))
        own = {f'JUPYTER_{k.upper()}_DIR': str(home/k) for k in ('config', 'data', 'runtime')} | {'IPYTHONDIR': str(home/'ipython')}
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get('PATH', '')])
        server = Server(f'http://127.0.0.1:{port}', token, home/'log')
        with server.log.open('w') as log:
            command = [sys.executable, '-m', module, *(a.replace('{port}', str(port)).replace('{token}', token) for a in arguments)]
            process = subprocess.Popen(command, cwd=cwd, env={**os.environ, 'PATH': path, **own, **(env or {})}, stdin=subprocess.DEVNULL,
                                       stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            # the login page answers without a token, and starts no kernel
            for _ in range(5*WAIT):
                if process.poll() is not None: raise RuntimeError(f'{module} ended at once:\n{server.log.read_text()[-3000:]}')
                try: urllib.request.urlopen(server.url + '/login', timeout=5).close()
                except urllib.error.HTTPError: break  # a server that asks for no token has no such page
                except OSError: time.sleep(0.2)
                else: break
            else: raise RuntimeError(f'{module} does not answer:\n{server.log.read_text()[-3000:]}')
            yield server
        finally: stop(process)


def jupyterlab(root, *options, env=None, settings=None):
    "A JupyterLab of the notebooks under root, which asks nothing of the network."
    return serving('jupyterlab', ['--no-browser', '--allow-root', '--ServerApp.ip=127.0.0.1', '--ServerApp.port={port}',
                                  '--ServerApp.port_retries=0', '--IdentityProvider.token={token}', f'--ServerApp.root_dir={root}',
                                  '--LabApp.news_url=None', '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate',
                                  '--LabApp.expose_app_in_browser=True', *options], root, env, {**LAB_SETTINGS, **(settings or {})})


def voila(root, *options, env=None):
    "A Voilà of the notebooks under root: no front-end extension but the widgets', and tracebacks in the page."
    allowed = [f'--VoilaConfiguration.extension_allowlist={e}' for e in WIDGETS]
    return serving('voila', ['.', '--no-browser', '--Voila.ip=127.0.0.1', '--port={port}', '--Voila.port_retries=0', '--token={token}',
                             '--show_tracebacks=True', *allowed, *options], root, env)


# ---- the browser ----

@pytest.fixture(scope='module')
def chromium():
    "The machine's Chromium; without it, or without playwright, the tests that ask for it are skipped."
    path = next(filter(None, map(shutil.which, CHROMES)), None)
    if path is None: pytest.skip(f'no browser: none of {", ".join(CHROMES)} is on the PATH')
    api = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    with api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


def message(payload):
    "(channel, type, own id, parent's id, content) of a frame to or from a kernel, in either protocol; None for any other frame."
    try:
        if isinstance(payload, str):
            m = json.loads(payload)
            channel, header, parent, content = m['channel'], m['header'], m['parent_header'], m['content']
        else:  # v1.kernel.websocket.jupyter.org: a count, offsets, then the parts
            n = int.from_bytes(payload[:8], 'little')
            at = [int.from_bytes(payload[8*i:8*i + 8], 'little') for i in range(1, n + 1)]
            channel, header, parent, _, content = (payload[a:b] for a, b in zip(at[:5], at[1:6]))
            channel, (header, parent, content) = channel.decode(), map(json.loads, (header, parent, content))
        return channel, header['msg_type'], header['msg_id'], parent.get('msg_id'), content
    except (ValueError, KeyError, TypeError): return None


def ask(page, script):
    "What a script finds in the page; None while the page is on its way to another."
    try: return page.evaluate(script)
    except Exception as e:
        if 'context was destroyed' in str(e): return None
        raise


# Voilà keeps an output in a script until it draws it, and a widget says so until its view is there
DRAWN = '''() => {
  if (document.querySelector('script[type="application/vnd.voila.cell-output+json"]')) return null;
  const outputs = [...document.querySelectorAll('.jp-OutputArea-output')];
  if (outputs.some(o => o.childElementCount === 0 && o.textContent.startsWith('Loading widget'))) return null;
  return [outputs.length, document.querySelectorAll('.jupyter-widgets, .widget-slider, .widget-html-content > *').length].join();
}'''
# a frame has passed; a page that draws none does not hold this up
FRAME = '() => new Promise(r => { setTimeout(r, 500); requestAnimationFrame(() => setTimeout(r, 0)); })'

LEAVE = '''async token => {
  const lab = window.jupyterapp?.shell?.currentWidget?.sessionContext, config = document.querySelector('#jupyter-config-data');
  if (lab) return lab.shutdown();
  const id = JSON.parse(config?.textContent ?? '{}').kernelId;
  if (id) await fetch(`/voila/api/shutdown/${id}`, {method: 'POST', headers: {Authorization: `token ${token}`}});
}'''


@dataclass
class Reader:
    "One reader's page, what went wrong in it, and what a reader does with the widgets in it."
    page: object
    token: str = ''                                     # of the server whose page it is
    page_errors: list = field(default_factory=list)     # exceptions that no script caught
    console_errors: list = field(default_factory=list)
    kernel_errors: list = field(default_factory=list)   # of cells, and of widgets' callbacks, which no output shows
    outside: list = field(default_factory=list)         # addresses beyond this machine: answered with nothing, and remembered
    pending: set = field(default_factory=set)           # requests on which a kernel is still busy

    def __post_init__(self):
        self.page.on('pageerror', lambda e: self.page_errors.append(str(e)))
        self.page.on('crash', lambda _: self.page_errors.append('the page crashed'))
        # a page with unsaved changes asks whether to leave it
        self.page.on('dialog', lambda d: d.accept())
        self.page.on('console', lambda m: self.console_errors.append(m.text) if m.type == 'error' else None)
        self.page.on('websocket', self._listen)
        self.page.route(re.compile(r'^https?://(?!127\.0\.0\.1[:/])'), self._outside)

    def _outside(self, route):
        self.outside.append(route.request.url)
        route.fulfill(status=200, body='')

    def _listen(self, socket):
        if '/channels' not in socket.url: return
        socket.on('framesent', lambda p: self._sent(message(p)))
        socket.on('framereceived', lambda p: self._received(message(p)))
        socket.on('close', lambda _: self.pending.clear())

    def _sent(self, m):
        if m and m[0] == 'shell': self.pending.add(m[2])

    def _received(self, m):
        if m is None: return
        _, kind, _, parent, content = m
        if kind == 'status' and content['execution_state'] == 'idle': self.pending.discard(parent)
        if kind == 'error': self.kernel_errors.append(f'{content["ename"]}: {content["evalue"]}')

    def until(self, done, what, seconds=WAIT):
        "Wait for done(), and keep the page alive meanwhile."
        end = time.monotonic() + seconds
        while not done():
            if time.monotonic() > end: raise TimeoutError(f'{what} took more than {seconds} s')
            self.page.wait_for_timeout(50)

    def settled(self, still=0.25, seconds=WAIT):
        "Wait until no kernel works on anything this page asked for; a widget sends its next value when the last one is done."
        since = time.monotonic()
        def quiet():
            nonlocal since
            if self.pending: since = time.monotonic()
            return time.monotonic() - since > still
        self.until(quiet, 'the kernel\'s work', seconds)
        self.page.evaluate(FRAME)
        return self

    def drawn(self, still=0.3, seconds=WAIT):
        "Wait until outputs and widgets are in the page, and no more of them come."
        since, last = time.monotonic(), None
        def all_there():
            nonlocal since, last
            if (now := ask(self.page, DRAWN)) is None or now != last: since, last = time.monotonic(), now
            return time.monotonic() - since > still
        self.until(all_there, 'drawing', seconds)
        return self.settled(seconds=seconds)

    def leave(self):
        "End the page's kernel: JupyterLab keeps it, and Voilà 0.5 refuses its own page's request to end it, which lacks an XSRF token."
        with contextlib.suppress(Exception): self.page.evaluate(LEAVE, self.token)

    @property
    def cell_errors(self): return [t for t in self.page.locator(STDERR).all_inner_texts() if ERROR.search(t)]

    @property
    def errors(self): return self.page_errors + self.console_errors + self.kernel_errors + self.cell_errors

    def text(self, selector='.jp-OutputArea-output', nth=0): return self.page.locator(selector).nth(nth).inner_text().strip()

    def picture(self, alt):
        "The address of the picture with this text instead of it; an embedded one holds its bytes."
        return self.page.get_by_alt_text(alt, exact=True).get_attribute('src')

    def control(self, kind, description, within=None):
        "The widget of class kind whose label reads description; within: a locator, where two read the same."
        label = self.page.locator('.widget-label', has_text=re.compile(rf'^\s*{re.escape(description)}\s*$'))
        return (within or self.page).locator(f'.{kind}').filter(has=label)

    # sliders: of numbers, of logarithms, of a selection

    def slider(self, description, within=None): return self.control('widget-slider', description, within)

    def handle(self, description, within=None): return self.slider(description, within).get_by_role('slider')

    def reading(self, description, within=None): return self.slider(description, within).locator('.widget-readout').inner_text()

    def press(self, description, *keys, within=None):
        "Keys on a slider's handle: ArrowRight, Home, End, PageUp, ..."
        handle = self.handle(description, within)
        handle.focus()
        for k in keys: handle.press(k)
        return self.settled()

    def _track(self, description, share, within):
        box = self.slider(description, within).locator('.noUi-base').bounding_box()
        return box['x'] + share*box['width'], box['y'] + box['height']/2

    def drag(self, description, share, within=None, steps=8):
        "Drag the handle to a share of the track, 0 to 1."
        handle = self.handle(description, within)
        handle.scroll_into_view_if_needed()
        handle.hover()
        self.page.mouse.down()
        self.page.mouse.move(*self._track(description, share, within), steps=steps)
        self.page.mouse.up()
        return self.settled()

    def click_track(self, description, share, within=None):
        self.slider(description, within).scroll_into_view_if_needed()
        self.page.mouse.click(*self._track(description, share, within))
        return self.settled()

    def enter(self, description, text, within=None):
        "Type a value where a slider shows its own."
        readout = self.slider(description, within).locator('.widget-readout')
        readout.fill(str(text))
        readout.press('Enter')
        return self.settled()

    # the other controls

    def choose(self, description, option, within=None):
        self.control('widget-dropdown', description, within).locator('select').select_option(label=option)
        return self.settled()

    def toggle(self, description, option, within=None):
        self.control('widget-toggle-buttons', description, within).get_by_role('button', name=option, exact=True).click()
        return self.settled()

    def click(self, name):
        self.page.locator('.widget-button', has_text=re.compile(rf'^\s*{re.escape(name)}\s*$')).click()
        return self.settled()

    def upload(self, description, name, data, kind='application/octet-stream'):
        "Hand a file to an upload button; its input is not part of the page, only the dialogue that it opens is."
        with self.page.expect_file_chooser() as chooser:
            self.page.locator('.widget-upload', has_text=description).click()
        chooser.value.set_files({'name': name, 'mimeType': kind, 'buffer': data})
        return self.settled()


@contextlib.contextmanager
def reader(browser, **context):
    "A page with cookies and storage of its own."
    context = browser.new_context(viewport=dict(width=1280, height=900), **context)
    context.set_default_timeout(1000*WAIT)
    try:
        yield (r := Reader(context.new_page()))
        r.leave()
    finally: context.close()


def goto(reader, server, path, **query):
    reader.token = server.token
    answer = reader.page.goto(server.at(path, **query), wait_until='commit')
    if not answer.ok: raise RuntimeError(f'{answer.status} {answer.status_text}: {answer.text()[-1000:]}')


LOADED = '() => document.readyState === "complete" && !document.querySelector("#loading, .voila-skeleton-container")'


def open_voila(reader, server, notebook, seconds=WAIT):
    "Open a notebook in Voilà, and wait until its cells have run and are shown."
    goto(reader, server, f'/voila/render/{notebook}')
    reader.until(lambda: ask(reader.page, LOADED), 'the page', seconds)
    return reader.drawn()


STATE = '''() => {
  const panel = window.jupyterapp?.shell?.currentWidget, context = panel?.sessionContext;
  return {dialogue: !!document.querySelector('.jp-Dialog'), ran: window.ranAll ?? null,
          ready: !!(context?.isReady && panel.context.isReady), kernel: context?.session?.kernel?.status ?? null};
}'''
RUN = '''() => {
  window.ranAll = null;
  window.jupyterapp.commands.execute('notebook:run-all-cells').then(() => { window.ranAll = 'done'; }, e => { window.ranAll = String(e); });
}'''


def lab_state(reader):
    "What JupyterLab says of its notebook; a dialogue, such as that for the kernel, is answered as it proposes."
    s = ask(reader.page, STATE) or {}
    if s.get('dialogue'):
        # it may go by itself
        with contextlib.suppress(Exception): reader.page.locator('.jp-Dialog .jp-mod-accept').last.click(timeout=2000)
    return s


def open_lab(reader, server, notebook, seconds=WAIT):
    "Open a notebook in JupyterLab, and wait until its kernel is ready."
    goto(reader, server, f'/lab/tree/{notebook}', reset=None)
    reader.until(lambda: (s := lab_state(reader)).get('ready') and s['kernel'] == 'idle', 'the notebook', seconds)
    return reader


def run_all(reader, seconds=WAIT):
    "Run all cells as the menu does; JupyterLab says when the last of them is done. A cell that fails ends the run: see reader.errors."
    reader.page.evaluate(RUN)
    reader.until(lambda: (s := lab_state(reader)).get('ran') and s['kernel'] == 'idle', 'the cells', seconds)
    ran = reader.page.evaluate('() => window.ranAll')
    if ran != 'done': raise RuntimeError(ran)
    return reader.drawn()
