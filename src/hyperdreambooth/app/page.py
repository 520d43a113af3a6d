"""The page: a line of explanation for each step, and which action each button calls; and how it is run, on the loopback address unless
told otherwise, and then only with a password."""

import os
import shutil
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from .. import assets
from ..api import HyperDreamBooth
from ..assets import toon
from ..errors import InputError
from .actions import Actions, Opener
from .replies import bar
from .sessions import GREETING, Guard, Visits

LOOPBACK = ("127.0.0.1", "localhost", "::1")  # The addresses that only this machine can reach.
SWEEP = 60  # Seconds between two looks for visits that are over.
PRIVATE: dict[str, Any] = {"api_visibility": "private"}
ON_MODEL: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}  # One at a time: a model carries one LoRA at a time.
SCHEDULERS = ["DPMSolverMultistepScheduler", "DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"]
CSS = (Path(assets.__file__).parent / "page.css").read_text(encoding="utf-8")
SHOWN = f"/gradio_api/file={GREETING}"
HEAD = f"""<meta property="og:title" content="hyperdreambooth">
<meta property="og:description" content="One face photo in, a personal LoRA for Stable Diffusion out.">
<meta property="og:image" content="{SHOWN}">"""
"""What a link to the page is shown with."""


def build(actions: Actions, hdb: HyperDreamBooth) -> gr.Blocks:
    """The page over `actions`, begun with `hdb`: a function a section, each of which lays it out and says which action its buttons call."""
    gr.set_static_paths(actions.visits.public)
    with gr.Blocks(title="hyperdreambooth", analytics_enabled=False) as page:
        gr.Markdown(
            "# One face photo in, a personal LoRA out\n"
            "Runs on this machine alone; nothing you give it leaves it, and all of it goes when you close this page."
        )
        greeting = f'<img src="{SHOWN}" alt="" class="hdb-greeting">One photo, and five pictures that were drawn of the person.'
        gr.HTML(greeting)
        how = "Or type a folder, a .safetensors checkpoint or a hub id, then Enter. It is loaded at once." if actions.any_base else None
        choice: dict[str, Any] = {"allow_custom_value": actions.any_base, "visible": actions.any_base or len(actions.bases) > 1}
        chosen = gr.Dropdown(actions.bases, value=hdb.base, label="Base: the model that draws", info=how, elem_id="base", **choice)
        values = first_values(hdb)
        with gr.Row():
            with gr.Column(min_width=320):
                shown, seen = _photo(actions, values)
            with gr.Column(min_width=320):
                consent, progress, *begun = _personalize(actions, values, shown)
        with gr.Column(visible=False, elem_id="later") as later:  # until there is a LoRA
            jobs = [*begun, *_draw(actions, values, shown), _mix(actions, consent)]
            shown["home"] = gr.Markdown(values["home"])
            files = gr.File(label="Your files", file_count="multiple", interactive=False, elem_id="files")

        def choose(name: str, request: gr.Request) -> list[Any]:
            now = first_values(actions.choose(name, request))
            now["compared"] = gr.Gallery([], elem_classes=now["compared"].split())
            return [*(now[key] for key in shown), [], bar(f"The base is {name} now."), "", [], gr.Column(visible=False)]

        chosen.input(choose, chosen, [*shown.values(), *seen, *progress, later], api_name="choose", **ON_MODEL)
        for event in begun:
            event.success(lambda: gr.Column(visible=True), None, later, queue=False, **PRIVATE)
        for index, job in enumerate(jobs):
            job.success(actions.take, None, files, api_name="take", **(PRIVATE if index else {}))
        page.load(actions.enter, queue=False, **PRIVATE)
        page.unload(actions.leave)
    page.queue(max_size=100, default_concurrency_limit=2, status_update_rate=1, api_open=False)
    return page


def first_values(hdb: HyperDreamBooth) -> dict[str, Any]:
    """What a base brings to the page: its own settings, and what it is good for in words."""
    own = hdb.generate_config()
    note = f"The base `{hdb.base}` draws it" + (". " if hdb.source else ", without a hypernetwork: a person is trained from scratch.")
    cartoon_note = "It knows small cartoon faces: a photograph of a person won't come out as that person. Example faces will."
    trigger = hdb.prompt.replace("[V]", hdb.identifier)
    return {
        "base": note + cartoon_note * (hdb.base == "toon"),
        "home": "## 4. Take it home\n`person.safetensors` opens in diffusers, `person-kohya.safetensors` in A1111 and ComfyUI; put "
        f"`{trigger}` into the prompt there. The zip holds every picture and a contact sheet.",
        "fine-tuning": hdb.personalize_config().steps,
        "prompts": hdb.prompt,
        "contexts": [name for name, prompt in toon.palette()["contexts"].items() if prompt == hdb.prompt],
        "guidance": own.guidance,
        "identity": own.identity or 0.0,
        "steps": own.steps,
        "compared": f"hdb-pictures {'hdb-three' if hdb.source else 'hdb-two'}",
    }


def _photo(actions: Actions, values: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """The components whose values come from the base, by the names of `first_values`; and where it says what was understood."""
    gr.Markdown("## 1. A photo\nOne photo of a person, or a few of the same person, or an example face.")
    about = gr.Markdown(values["base"], elem_id="about")
    examples = _pictures("examples", "hdb-faces", value=toon.faces(), allow_preview=False)
    number = gr.Number(visible=False)
    with gr.Row():
        sources: dict[str, Any] = {"sources": ["upload", "webcam", "clipboard"], "file_types": ["image"], "type": "filepath"}
        uploaded = gr.Gallery(label="Photos", columns=4, height=170, elem_id="photos", scale=2, **sources)
        several = "Which face, where there are several"
        face = gr.Number(1, label=several, info="1 is the largest.", precision=0, minimum=1, elem_id="face", min_width=120)
    note = gr.HTML(bar("What is understood of the photo appears here."), elem_id="note")
    seen = [_pictures("understood"), note]
    uploaded.change(actions.look, [uploaded, face], seen, api_name="look")
    face.change(actions.look, [uploaded, face], seen, **PRIVATE)
    examples.select(_chosen, None, number, queue=False, **PRIVATE).then(actions.example, number, seen, api_name="example")
    return {"base": about}, seen


def _personalize(actions: Actions, values: dict[str, Any], own: dict[str, Any]) -> tuple[Any, ...]:
    """The box of consent, the progress with its pictures, and the events after which there is a LoRA."""
    gr.Markdown("## 2. Personalize\nA prediction within seconds, then fine-tuning that makes it fit. *Stop* keeps what there is.")
    agreed = "I am the person in the photo, or the person agrees"
    consent = gr.Checkbox(label=agreed, info="Example faces need no one's consent.", elem_id="consent")
    own["fine-tuning"] = steps = gr.Slider(
        0, 400, values["fine-tuning"], step=1, label="Fine-tuning steps", info="0 keeps the prediction.", elem_id="steps"
    )
    with gr.Row():
        personalize = gr.Button("Personalize", variant="primary", elem_id="personalize")
        stop = gr.Button("Stop", elem_id="stop")
    shown = [gr.HTML(elem_id="progress"), _pictures("previews")]
    with gr.Accordion("Or go on with a LoRA or token file that you made earlier", open=False):
        earlier = gr.File(label="LoRA or token file", file_types=[".safetensors", ".tokens"], elem_id="earlier")
    stop.click(actions.stop, None, shown[0], queue=False, api_name="stop")
    done = _job(actions, personalize, shown, "personalize", inputs=[steps, consent])
    return consent, shown, done, earlier.upload(actions.load, earlier, shown, api_name="load", **ON_MODEL)


def _draw(actions: Actions, values: dict[str, Any], own: dict[str, Any]) -> list[Any]:
    """The events after which there are new pictures."""
    gr.Markdown("## 3. Draw\nWrite prompts, a line each, with `[V]` where the person belongs, or tick some.")
    with gr.Row():
        with gr.Column(min_width=320):
            prompts = gr.Textbox(values["prompts"], label="Prompts", lines=3, max_length=4000, elem_id="prompts")
            contexts = gr.CheckboxGroup(list(actions.palette["contexts"]), value=values["contexts"], label="Contexts", elem_id="contexts")
            styles = gr.CheckboxGroup(list(actions.palette["styles"]), label="Styles", elem_id="styles")
            with gr.Row():
                count = gr.Slider(1, 8, 1, step=1, label="Pictures of each", elem_id="count")
                strength = gr.Slider(0, 1.5, 1, step=0.05, label="Identity strength", elem_id="strength")
            with gr.Accordion("More settings", open=False):
                seed = gr.Number(0, label="First seed", precision=0, minimum=0, maximum=2**53, elem_id="seed")
                with gr.Row():
                    guidance = gr.Slider(1, 15, values["guidance"], step=0.5, label="Prompt guidance", info="1 is none.")
                    identity = gr.Slider(0, 8, values["identity"], step=0.25, label="Identity guidance", info="0 is none.")
                    steps = gr.Slider(1, 100, values["steps"], step=1, label="Denoising steps")
                settings = {
                    "prompts": prompts,
                    "seed": seed,
                    "count": count,
                    "strength": strength,
                    "guidance": guidance,
                    "identity": identity,
                    "steps": steps,
                    "scheduler": gr.Dropdown([("the base's own", ""), *SCHEDULERS], value="", label="Scheduler"),
                    "styles": gr.File(label="Style LoRAs", file_count="multiple", file_types=[".safetensors"], elem_id="style-loras"),
                    "style_weight": gr.Slider(0, 1.5, 0.7, step=0.05, label="Weight of the style LoRAs"),
                }
            with gr.Row():
                draw = gr.Button("Draw", variant="primary", elem_id="draw", min_width=90)
                compare = gr.Button("Compare", elem_id="compare", min_width=90)
                stop = gr.Button("Stop", elem_id="stop-drawing", min_width=90)
        with gr.Column(min_width=320):
            drawing = gr.HTML(bar("Pictures appear here. Compare draws each prompt without the LoRA as well."), elem_id="drawing")
            # a prompt a row: without the LoRA, the prediction where there is one, with the LoRA
            drawn, compared = _pictures("pictures", "hdb-pictures hdb-large"), _pictures("compared", values["compared"])
    own |= {"prompts": prompts, "contexts": contexts, "guidance": guidance, "identity": identity, "steps": steps, "compared": compared}
    for ticked in (contexts, styles):
        ticked.change(actions.pick, [contexts, styles, prompts], prompts, queue=False, **PRIVATE)
    stop.click(actions.stop, None, drawing, queue=False, **PRIVATE)
    return [
        _job(actions, button, [drawing, pictures], name, inputs_kwargs={**settings, "compare": gr.State(name == "compare")})
        for name, button, pictures in (("draw", draw, drawn), ("compare", compare, compared))
    ]


def _mix(actions: Actions, consent: gr.Checkbox) -> Any:
    with gr.Accordion("Mix two people", open=False, elem_id="two"):
        gr.Markdown("Give a second person; the mix is who is drawn from then on. Fine-tuning isn't in a mix of two predictions.")
        with gr.Row():
            second = gr.File(label="A photo, a LoRA or a token file", elem_id="second", height=170)
            with gr.Column():
                numbers = [("none", 0), *((f"example face {number}", number) for number in range(1, len(toon.faces()) + 1))]
                example = gr.Dropdown(numbers, value=0, label="Or an example face", elem_id="second-example")
                share = gr.Slider(0, 1, 0.5, step=0.05, label="From the first person to the second", elem_id="share")
                mix = gr.Button("Mix", elem_id="mix")
        shown = [gr.HTML(elem_id="mixing"), _pictures("mixed")]
    return mix.click(actions.mix, [second, example, share, consent], shown, api_name="mix", **ON_MODEL)


def _job(actions: Actions, button: gr.Button, outputs: list[Any], name: str, **inputs: Any) -> Any:
    """A button whose job waits for its turn; `outputs` begin with the line that says so. The event after which the job is done."""
    waiting = button.click(actions.begin, None, outputs[0], queue=False, **PRIVATE)
    action = actions.personalize if name == "personalize" else actions.draw
    job = waiting.success(action, outputs=outputs, api_name=name, **inputs, **ON_MODEL)
    job.failure(lambda: bar(""), None, outputs[0], queue=False, **PRIVATE)  # a message says why; nothing waits any more
    return job


def _pictures(name: str, classes: str = "hdb-pictures", **more: Any) -> gr.Gallery:
    looks: dict[str, Any] = {"show_label": False, "interactive": False, "object_fit": "contain"}
    buttons = [] if name in ("examples", "understood") else ["download", "fullscreen"]
    return gr.Gallery(elem_id=name, elem_classes=classes.split(), buttons=buttons, **looks, **more)


def _chosen(event: gr.SelectData) -> int:
    """Which example face was clicked, from 1."""
    if not isinstance(event.index, int):
        raise InputError("click on one of the faces.")
    return event.index + 1


@dataclass
class Server:
    """A running page."""

    page: gr.Blocks
    url: str
    visits: Visits
    cache: str  # Where Gradio put its files before.

    def close(self) -> None:
        """Ends it, and deletes all that was uploaded and made."""
        self.visits.over.set()
        for session in list(self.visits.visits):
            self.visits.end(session)
        self.page.close(verbose=False)
        shutil.rmtree(self.visits.root, ignore_errors=True)
        os.environ["GRADIO_TEMP_DIR"] = self.cache


def start(
    hdb: HyperDreamBooth,
    *,
    open_base: Opener | None = None,
    bases: Sequence[str] = (),
    host: str = "127.0.0.1",
    port: int | None = None,
    auth: tuple[str, str] | None = None,
    max_upload_mb: int = 50,
    browser: bool = False,
) -> Server:
    """Starts the page and returns at once.

    Args:
        open_base: opens another base by name where a visitor chooses one; None: there is no choice.
        bases: those to choose from besides `hdb`'s. Where only this machine can reach the page, any other can be named as well.
        port: None takes the first free one from 7860.
        auth: user and password, asked of everyone.
        max_upload_mb: larger files are refused while they arrive.

    Raises InputError for another address than loopback without `auth`, and where the port is taken.
    """
    check_host(host, auth)
    visits = Visits(Path(tempfile.mkdtemp(prefix="hyperdreambooth-")).resolve())
    cache, os.environ["GRADIO_TEMP_DIR"] = os.environ.get("GRADIO_TEMP_DIR", ""), str(visits.root)

    def sweep() -> None:
        while not visits.over.wait(SWEEP):
            visits.sweep()

    gates = [Middleware(Guard, visits=visits)]
    if host in LOOPBACK:  # a name that another site lets point here isn't answered
        gates.insert(0, Middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"]))
    page = build(Actions(hdb, visits, open_base, bases, any_base=bool(open_base) and host in LOOPBACK and not auth), hdb)
    # a theme that loads nothing: Gradio's usual ones ask for fonts; what explains is dark enough to be read
    fonts = {"font": ["system-ui", "-apple-system", "Segoe UI", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    theme = gr.themes.Default(primary_hue="indigo", **fonts).set(body_text_color_subdued="*neutral_500")
    looks = {"theme": theme, "css": CSS, "head": HEAD, "footer_links": ["api"]}
    where: dict[str, Any] = {"server_name": host, "server_port": port, "auth": auth, "inbrowser": browser}
    limits = {"max_file_size": max_upload_mb * 1_000_000, "state_session_capacity": 100}
    off = dict.fromkeys(("share", "show_error", "ssr_mode", "run_history", "mcp_server"), False)
    server = Server(page, "", visits, cache)
    try:
        _, server.url, _ = page.launch(
            **where, **looks, **limits, **off, prevent_thread_lock=True, quiet=True, app_kwargs={"middleware": gates}
        )
    except OSError as error:
        server.close()
        raise InputError(f"port {port or '7860 and the hundred after it'} can't be used on {host}. Give another with --port.") from error
    threading.Thread(target=sweep, daemon=True).start()
    return server


def check_host(host: str, auth: object) -> None:
    """Raises InputError where others can reach the address and nobody would be asked who they are."""
    if host not in LOOPBACK and not auth:
        raise InputError(f"{host} can be reached by others: give --auth USER:PASSWORD as well, or leave --host out.")
