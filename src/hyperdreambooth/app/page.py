"""The page's layout and events, and its server, which needs a password on any address but the loopback one."""

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

LOOPBACK = ("127.0.0.1", "localhost", "::1")  # Addresses that only this machine can reach.
SWEEP = 60  # Seconds between two calls of `Visits.sweep`.
PRIVATE: dict[str, Any] = {"api_visibility": "private"}
ON_MODEL: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}  # One job at a time, since a model holds one LoRA.
SCHEDULERS = ["DPMSolverMultistepScheduler", "DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"]
CSS = (Path(assets.__file__).parent / "page.css").read_text(encoding="utf-8")
SHOWN = f"/gradio_api/file={GREETING}"
HEAD = f"""<meta property="og:title" content="hyperdreambooth">
<meta property="og:description" content="One face photo in, a personal LoRA for Stable Diffusion out.">
<meta property="og:image" content="{SHOWN}">"""
"""Open Graph tags, with which other sites and messengers preview a link to the page."""


def build(actions: Actions, hdb: HyperDreamBooth) -> gr.Blocks:
    """Builds the page for `actions`, at first with the base `hdb`. Each section has a function for its layout and its events."""
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
    """Values of components that depend on the base: its default settings, and texts about it."""
    own = hdb.generate_config()
    note = f"The base `{hdb.base}` draws it" + (". " if hdb.source else ", without a hypernetwork: a person is trained from scratch.")
    cartoon_note = "It knows small cartoon faces: a photograph of a person won't come out as that person. Example faces will."
    trigger = hdb.prompt.replace("[V]", hdb.identifier)
    kohya = "transformer" not in hdb.backbone.components
    opens = "diffusers, `person-kohya.safetensors` in A1111 and ComfyUI" if kohya else "diffusers and ComfyUI"
    return {
        "base": note + cartoon_note * (hdb.base == "toon"),
        "home": f"## 4. Take it home\n`person.safetensors` opens in {opens}; put `{trigger}` into the prompt there. "
        "The zip holds every picture and a contact sheet.",
        "fine-tuning": hdb.personalize_config().steps,
        "prompts": hdb.prompt,
        "contexts": [name for name, prompt in toon.palette()["contexts"].items() if prompt == hdb.prompt],
        "guidance": own.guidance,
        "identity": own.identity or 0.0,
        "steps": own.steps,
        "compared": f"hdb-pictures {'hdb-three' if hdb.source else 'hdb-two'}",
    }


def _photo(actions: Actions, values: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """The section for photos: components with values of the base, by their names in `first_values`, and the outputs of `look`."""
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
    """The section for personalizing: the consent checkbox, the outputs (status, previews), and two events after which there is a LoRA."""
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
    """The section for drawing: the two events after which there are new pictures. Adds components with the base's values to `own`."""
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
            # Compare shows a row for each prompt: without the LoRA, the prediction (if there is one), with the LoRA
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
    """The section for mixing two people: the event after which there is a mix."""
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
    """Binds a button to a job that waits for its turn; the first of `outputs` is its status. Returns the event of the job."""
    waiting = button.click(actions.begin, None, outputs[0], queue=False, **PRIVATE)
    action = actions.personalize if name == "personalize" else actions.draw
    job = waiting.success(action, outputs=outputs, api_name=name, **inputs, **ON_MODEL)
    job.failure(lambda: bar(""), None, outputs[0], queue=False, **PRIVATE)  # clears the status; the error is shown as a message
    return job


def _pictures(name: str, classes: str = "hdb-pictures", **more: Any) -> gr.Gallery:
    """A gallery of results, with buttons to download and enlarge them unless they are photos."""
    looks: dict[str, Any] = {"show_label": False, "interactive": False, "object_fit": "contain"}
    buttons = [] if name in ("examples", "understood") else ["download", "fullscreen"]
    return gr.Gallery(elem_id=name, elem_classes=classes.split(), buttons=buttons, **looks, **more)


def _chosen(event: gr.SelectData) -> int:
    """The number of the clicked example face, from 1."""
    if not isinstance(event.index, int):
        raise InputError("click on one of the faces.")
    return event.index + 1


@dataclass
class Server:
    """A running page."""

    page: gr.Blocks
    url: str
    visits: Visits
    cache: str | None  # GRADIO_TEMP_DIR before the page was started; None where it was unset.

    def close(self) -> None:
        """Stops the server, and deletes all uploads and results."""
        self.visits.over.set()
        for session in list(self.visits.visits):
            self.visits.end(session)
        self.page.close(verbose=False)
        shutil.rmtree(self.visits.root, ignore_errors=True)
        os.environ.pop("GRADIO_TEMP_DIR", None)
        if self.cache is not None:
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
        open_base: opens the base that a visitor chooses, by name; without it there is no choice.
        bases: bases to choose from, besides that of `hdb`. On the loopback address and without `auth`, visitors can type any other too.
        port: the port to listen on; None takes the first free one from 7860.
        auth: user name and password that every visitor has to give.
        max_upload_mb: the largest upload in megabytes; larger ones are refused while they arrive.
        browser: also opens the page in the default browser.

    Raises InputError for an address other than loopback without `auth`, and if the port is taken.
    """
    check_host(host, auth)
    visits = Visits(Path(tempfile.mkdtemp(prefix="hyperdreambooth-")).resolve())
    cache, os.environ["GRADIO_TEMP_DIR"] = os.environ.get("GRADIO_TEMP_DIR"), str(visits.root)

    def sweep() -> None:
        while not visits.over.wait(SWEEP):
            visits.sweep()

    gates = [Middleware(Guard, visits=visits)]
    if host in LOOPBACK:  # against DNS rebinding: other sites' host names that resolve to this address are refused
        gates.insert(0, Middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"]))
    page = build(Actions(hdb, visits, open_base, bases, any_base=bool(open_base) and host in LOOPBACK and not auth), hdb)
    # Gradio's default theme loads web fonts, and its explanatory text has too little contrast
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
    """Raises InputError if other machines can reach the address and no password is asked."""
    if host not in LOOPBACK and not auth:
        raise InputError(f"{host} can be reached by others: give --auth USER:PASSWORD as well, or leave --host out.")
