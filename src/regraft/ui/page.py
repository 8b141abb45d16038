"""The page: what is chosen above, one tab for each thing that can be done with it below."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import sleep
from typing import Any

from regraft.demo import data_folder
from regraft.errors import RegraftError, UsageError
from regraft.formats import formats
from regraft.inspection import inspect_adapter
from regraft.report.schema import VerifyReport
from regraft.tensor_files import WEIGHTS_SUFFIXES
from regraft.ui import beside, places, shown
from regraft.ui._gradio import gr
from regraft.ui.asked import Asked, base_of, cleaned, prompts_of
from regraft.ui.desk import Desk, Progress
from regraft.ui.work import PICTURES, Made

_EVERY = 0.3
_JOBS = ("forecast", "port", "refine", "measure", "library")
# One that is dropped here is copied; bases are never dropped, they are named.
LARGEST = "4gb"


def theme() -> gr.Theme:
    """Gradio's, with our colours and the system's fonts: a font from elsewhere would be a request to there."""
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"]
    mono = ["ui-monospace", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]
    given = gr.themes.Default(primary_hue="emerald", neutral_hue="stone", font=fonts, font_mono=mono)
    ours = {
        "body_text_color": "var(--ink)",
        "block_background_fill": "var(--paper)",
        "block_label_text_color": "var(--soft)",
        "block_info_text_color": "var(--soft)",
        "background_fill_primary": "var(--paper)",
        "background_fill_secondary": "var(--bg)",
        "border_color_primary": "var(--rule)",
        "input_background_fill": "var(--paper)",
        "button_primary_background_fill": "var(--good)",
        "button_primary_background_fill_hover": "var(--good)",
        "button_primary_text_color": "var(--paper)",
    }
    # Gradio's first page makes a variable of its own of this one, also called --bg: it can't be named by that.
    ground = {"body_background_fill": "#f7f5f0", "body_background_fill_dark": "#171816"}
    # Of the marked tab: Gradio's green is too light for words on our ground, and knows no dark one.
    accent = {"color_accent": "var(--good)"}
    return given.set(**ground, **accent, **ours, **{f"{name}_dark": value for name, value in ours.items()})


def build(desk: Desk, models: Sequence[Path] = ()) -> gr.Blocks:
    """The page over a desk.

    Args:
        desk: that it shows.
        models: folders whose bases are offered.
    """
    return _Page(desk, models).build()


class _Page:
    def __init__(self, desk: Desk, models: Sequence[Path]) -> None:
        self.desk = desk
        self.models = tuple(models)

    # ---- what is on it ------------------------------------------------------------------------------------------

    def build(self) -> gr.Blocks:
        blocks: gr.Blocks
        with gr.Blocks(title="regraft", analytics_enabled=False) as blocks:
            _html(shown.head())
            self._choices()
            self.status = _html(elem_id="status")
            self.stop = gr.Button("Stop", visible=False, elem_id="stop", size="sm")
            self.results: dict[str, gr.HTML] = {}
            with gr.Tabs():
                with gr.Tab("Will it survive?"):
                    self._forecast()
                with gr.Tab("Port"):
                    self._port()
                with gr.Tab("Refine"):
                    self._refine()
                with gr.Tab("Compare"):
                    self._compare()
                with gr.Tab("A whole folder"):
                    self._library()
            self._wire(blocks)
        return blocks

    def _choices(self) -> None:
        with gr.Row(equal_height=False):
            with gr.Column(min_width=280):
                self.file = gr.File(
                    label="LoRA: drop it here",
                    file_types=list(WEIGHTS_SUFFIXES),
                    height=132,
                    elem_id="file",
                    type="filepath",
                )
                self.lora = gr.Textbox(
                    label="or its path, or a hub id",
                    placeholder="/loras/style.safetensors, org/name",
                    info="Nothing is copied from a path.",
                    elem_id="lora",
                )
            with gr.Column(min_width=280):
                offered = self._offered()
                self.old = gr.Dropdown(
                    offered,
                    value=None,
                    label="Old base: what it was trained on",
                    info="A file, a diffusers or transformers folder, or a hub id.",
                    allow_custom_value=True,
                    elem_id="old",
                )
                self.new = gr.Dropdown(
                    offered,
                    value=None,
                    label="New base: what it is to run on",
                    allow_custom_value=True,
                    elem_id="new",
                )
                with gr.Row():
                    self.demo = gr.Button("Try it on the demo's models", size="sm", elem_id="demo")
                    self.swap = gr.Button("Swap the bases", size="sm", elem_id="swap")
        with gr.Accordion("Browse this computer", open=False, elem_id="browse"):
            home = Path.home() if Path.home().is_dir() else Path.cwd()
            begin = str(self.models[0] if self.models else home)
            self.root = gr.Textbox(label="Folder", value=begin, elem_id="root")
            self.tree = gr.FileExplorer(
                root_dir=begin,
                file_count="single",
                label="Point at a weights file, or at model_index.json or config.json for a whole folder",
                height=260,
                elem_id="tree",
            )
            with gr.Row():
                self.as_lora = gr.Button("It is the LoRA", size="sm")
                self.as_old = gr.Button("It is the old base", size="sm")
                self.as_new = gr.Button("It is the new base", size="sm")
        self.about = _html(elem_id="about")

    def _offered(self) -> list[str]:
        return list(dict.fromkeys([*places.recent(), *places.bases_in(self.models), *places.in_hub_cache()]))

    def _result(self, name: str) -> None:
        self.results[name] = _html(elem_id=f"result-{name}")

    def _forecast(self) -> None:
        gr.Markdown("A forecast from the weights, before any model is run. It takes seconds.")
        self.probe = gr.Checkbox(label="Run both models for a sharper one (minutes)", elem_id="probe")
        self.do_forecast = gr.Button("Will it survive?", variant="primary", elem_id="do-forecast")
        self._result("forecast")

    def _port(self) -> None:
        gr.Markdown("Writes a LoRA for the new base, in the format that it came in. Nothing is overwritten.")
        with gr.Accordion("Options", open=False):
            with gr.Row():
                self.strength = gr.Slider(0.0, 2.0, 1.0, step=0.05, label="Strength")
                self.rank = gr.Textbox("keep", label="Rank", info="A number, a share such as 0.9, keep or full.")
                written = sorted(name for name, form in formats().items() if form.write is not None)
                self.format = gr.Dropdown([("as it came", ""), *written], value="", label="Format")
            with gr.Row():
                self.private = gr.Checkbox(True, label="Keep what its metadata says of paths, names and tags")
                self.force = gr.Checkbox(False, label="Port against a refusal (the file says so)")
        self.do_port = gr.Button("Port", variant="primary", elem_id="do-port")
        self._result("port")

    def _refine(self) -> None:
        gr.Markdown(
            "Brings a port the rest of the way: both bases run, and no training data is needed. It begins from what "
            "was ported here, or makes a port of its own."
        )
        self.minutes = gr.Slider(
            0, 60, 5, step=1, label="Minutes, at most", info="0: as many as it takes.", elem_id="minutes"
        )
        self.do_refine = gr.Button("Refine", variant="primary", elem_id="do-refine")
        self.live = _html(elem_id="live")
        self._result("refine")

    def _compare(self) -> None:
        gr.Markdown("Runs old and new base with and without the LoRA, measures, and draws where they draw.")
        self.prompts = gr.Textbox(
            label="Prompts, one a line",
            lines=3,
            info="Also used by a refine, and by a port that runs both bases. Empty: general ones.",
            elem_id="prompts",
        )
        self.which = gr.Radio(
            [("what was ported", "port"), ("what was refined", "refine")], value="port", label="Compare"
        )
        self.do_measure = gr.Button("Compare", variant="primary", elem_id="do-measure")
        with gr.Column(visible=False) as self.compared:
            with gr.Row():
                # On a phone one below the other: half of its width is too little for their titles.
                self.left = gr.Dropdown([], label="Left", elem_id="left", min_width=260)
                self.right = gr.Dropdown([], label="Right", elem_id="right", min_width=260)
                self.row = gr.Dropdown([], label="Prompt", elem_id="row", min_width=260)
            self.slider = _html(elem_id="slider")
        self._result("measure")

    def _library(self) -> None:
        gr.Markdown(
            "Every LoRA of a folder, from the old base to the new one chosen above. Begun again, it goes on where it "
            "was."
        )
        self.folder = gr.Textbox(label="Folder of LoRAs", elem_id="folder")
        with gr.Row():
            self.do_check_all = gr.Button("Forecast all", elem_id="do-check-all")
            self.do_port_all = gr.Button("Port all", variant="primary", elem_id="do-port-all")
        self._result("library")

    # ---- what happens -------------------------------------------------------------------------------------------

    def _wire(self, blocks: gr.Blocks) -> None:
        shows = [self.status, self.stop, self.live, *self.results.values()]
        lora = [self.file, self.lora]
        chosen = [*lora, self.old, self.new]
        streamed: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None}
        # Answered by the request itself. Through Gradio's queue, whose stream ends with the last answer, the next click
        # could come just when it ends, and be answered to nobody.
        at_once: dict[str, Any] = {**streamed, "queue": False}

        self.file.upload(self._dropped, self.file, [self.lora, self.about], **at_once)
        self.file.clear(lambda: "", None, self.about, **at_once)
        for event in (self.lora.submit, self.lora.blur):
            event(self._typed, lora, [self.file, self.about], **at_once)
        self.demo.click(self._demo, None, [*chosen, self.prompts, self.about], **at_once)
        self.swap.click(lambda old, new: (new, old), [self.old, self.new], [self.old, self.new], **at_once)
        self.root.submit(self._at, self.root, [self.tree, self.status], **at_once)
        self.as_lora.click(self._picked_lora, self.tree, [*lora, self.about], **at_once)
        for button, base in ((self.as_old, self.old), (self.as_new, self.new)):
            button.click(lambda picked: base_of(picked) if picked else gr.skip(), self.tree, base, **at_once)

        port = [self.strength, self.rank, self.format, self.private, self.force]
        jobs: list[tuple[gr.Button, Callable[..., Iterator[Any]], list[Any]]] = [
            (self.do_forecast, self._do_forecast, [*chosen, self.prompts, self.probe]),
            (self.do_port, self._do_port, [*chosen, self.prompts, *port]),
            (self.do_refine, self._do_refine, [*chosen, self.prompts, self.minutes]),
            (self.do_check_all, self._do_check_all, [self.folder, self.old, self.new]),
            (self.do_port_all, self._do_port_all, [self.folder, self.old, self.new]),
            (self.do_measure, self._do_measure, [*chosen, self.prompts, self.which]),
        ]
        pair = [self.left, self.right, self.row]
        # A window that is opened anew, or closed amid of a job, shows what is on the desk.
        began = [button.click(job, given, shows, **streamed) for button, job, given in jobs]
        for event in (*began, blocks.load(self._now, None, shows, **streamed)):
            # Named anew, the same columns are no change, and yet other pictures.
            event.then(self._columns, None, [self.compared, *pair], **at_once).then(
                self._pair, pair, self.slider, **at_once
            )
        for choice in pair:
            choice.change(self._pair, pair, self.slider, **at_once)
        self.stop.click(self.desk.stop, None, None, **at_once)

    def _dropped(self, file: str | None) -> tuple[Any, str]:
        return "", self._about(file or "")

    def _typed(self, file: str | None, text: str) -> tuple[Any, str]:
        path = cleaned(text)
        # What was typed takes the place of what was dropped.
        return (None if path else gr.skip()), self._about(path or file or "")

    def _picked_lora(self, picked: str | None) -> tuple[Any, Any, Any]:
        if not picked:
            return gr.skip(), gr.skip(), gr.skip()
        path = str(Path(picked).parent) if Path(picked).name == "adapter_config.json" else picked
        return None, path, self._about(path)

    def _about(self, path: str) -> str:
        if not path:
            return ""
        try:
            return shown.inspected(inspect_adapter(path))
        except RegraftError as error:
            return shown.wrong_of(error)

    def _demo(self) -> tuple[Any, ...]:
        data = data_folder()
        style = data / "loras" / "style-v1.safetensors"
        prompts = json.loads((data / "demo.json").read_text(encoding="utf-8"))["report"]["prompts"]
        chosen = None, str(style), str(data / "v1"), str(data / "v2")
        return *chosen, "\n".join(prompts[:PICTURES]), self._about(str(style))

    def _at(self, folder: str) -> tuple[Any, Any]:
        path = Path(cleaned(folder))
        if not path.is_dir():
            return gr.skip(), shown.wrong(f"{path}: no such folder", "Check the path.")
        return gr.FileExplorer(root_dir=str(path)), ""

    def _asked(self, file: str | None, lora: str, old: str | None, new: str | None, prompts: str, **more: Any) -> Asked:
        subject = cleaned(lora) or file or "", cleaned(old), cleaned(new)
        out, device = str(self.desk.out), self.desk.device
        return Asked(*subject, out=out, device=device, prompts=prompts_of(prompts), **more)

    def _do_forecast(self, *given: Any) -> Iterator[Any]:
        *chosen, probe = given

        def start() -> None:
            self.desk.start("forecast", "Forecast", asked=self._asked(*chosen), probe=probe)

        yield from self._run(start)

    def _do_port(self, *given: Any) -> Iterator[Any]:
        *chosen, strength, rank, form, private, force = given
        how = {"strength": strength, "rank": rank.strip(), "format": form or "", "private": private, "force": force}

        def start() -> None:
            self.desk.start("port", "Port", asked=self._asked(*chosen, **how))

        yield from self._run(start)

    def _do_refine(self, *given: Any) -> Iterator[Any]:
        *chosen, minutes = given

        def start() -> None:
            asked = self._asked(*chosen)
            made = self._made("port", asked)
            # Of two experts, which one a refine would begin from is not for it to say.
            begin = made.files[0] if made is not None and len(made.files) == 1 else ""
            self.desk.start("refine", "Refine", asked=asked, start=begin, minutes=minutes)

        yield from self._run(start)

    def _do_measure(self, *given: Any) -> Iterator[Any]:
        *chosen, which = given

        def start() -> None:
            asked = self._asked(*chosen)
            made = self._made(which, asked)
            if made is None:
                done = "ported" if which == "port" else "refined"
                raise UsageError(f"This LoRA was not {done} here between these bases", remedy="Do that first.")
            self.desk.start("measure", "Compare", asked=asked, ported=made.files[0])

        yield from self._run(start)

    def _do_check_all(self, folder: str, old: str | None, new: str | None) -> Iterator[Any]:
        yield from self._all(folder, old, new, forecast_only=True)

    def _do_port_all(self, folder: str, old: str | None, new: str | None) -> Iterator[Any]:
        yield from self._all(folder, old, new, forecast_only=False)

    def _all(self, folder: str, old: str | None, new: str | None, *, forecast_only: bool) -> Iterator[Any]:
        def start() -> None:
            ends: dict[str, Any] = {"folder": cleaned(folder), "old": cleaned(old), "new": cleaned(new)}
            out, title = str(self.desk.out), "Forecast of the folder" if forecast_only else "Port of the folder"
            self.desk.start("library", title, out=out, forecast_only=forecast_only, **ends)

        yield from self._run(start)

    def _made(self, name: str, asked: Asked) -> Made | None:
        """What was made here of this very adapter between these very bases."""
        made = self.desk.results.get(name)
        return made if made is not None and made.asked is not None and made.asked.subject == asked.subject else None

    def _run(self, start: Callable[[], None]) -> Iterator[Any]:
        try:
            start()
        except RegraftError as error:
            if self.desk.running is None:
                yield shown.wrong_of(error), gr.skip(), gr.skip(), *[gr.skip()] * len(self.results)
                return
            # What the job at work says would take the place of words on the page.
            gr.Warning(error.what, title="Not now")
        yield from self._now()

    def _now(self) -> Iterator[Any]:
        """What is on the desk, until the job at work is through."""
        told: Progress | None = None
        change = second = -1
        while (job := self.desk.running) is not None:
            if (job.change, int(job.seconds)) != (change, second) or job is not told:
                results = [gr.skip() if job is told else shown.result(self.desk, name) for name in _JOBS]
                course = gr.skip() if job is told and job.change == change else shown.course(job)
                told, change, second = job, job.change, int(job.seconds)
                yield shown.progress(job), gr.Button(visible=True), course, *results
            sleep(_EVERY)
        results = [shown.result(self.desk, name) for name in _JOBS]
        yield shown.progress(self.desk.job), gr.Button(visible=False), "", *results

    # ---- pictures beside each other -----------------------------------------------------------------------------

    def _drawn(self) -> VerifyReport | None:
        made = self.desk.results.get("measure")
        return made.record if made is not None and made.record.pictures else None

    def _columns(self) -> tuple[Any, ...]:
        record = self._drawn()
        if record is None:
            return gr.Column(visible=False), gr.skip(), gr.skip(), gr.skip()
        titles, rows, (old, new) = beside.titles(record), beside.rows(record), beside.first(record)
        choices = gr.Dropdown(titles, value=old), gr.Dropdown(titles, value=new), gr.Dropdown(rows, value=0)
        return gr.Column(visible=True), *choices

    def _pair(self, left: str | None, right: str | None, row: int | None) -> Any:
        record = self._drawn()
        if record is None:
            return ""
        # While the three choices are filled in, each asks for itself: the answer to half of them may come last.
        told = shown.beside(record, left, right, row)
        return gr.skip() if told is None else told


def _html(value: str = "", **more: Any) -> gr.HTML:
    """Our own markup, with our own style alone."""
    return gr.HTML(value, apply_default_css=False, js_on_load=None, **more)
