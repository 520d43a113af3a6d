"""How the page looks: a line of explanation for each step, and which action each button calls."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ..assets import toon
from ..errors import InputError
from .actions import Actions, bar

SCHEDULERS = ["DPMSolverMultistepScheduler", "DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"]
CSS = """
.gradio-container { max-width: 62rem !important; margin: auto !important }
.hdb-status { display: flex; gap: .3rem .8rem; align-items: center; flex-wrap: wrap; min-height: 1.6rem }
.hdb-status progress { flex: 1 1 8rem; max-width: 20rem; height: .7rem; accent-color: var(--color-accent) }
.hdb-pictures, .hdb-faces { --cell: 9rem }
.hdb-faces { --cell: 3.4rem }
.hdb-pictures .grid-wrap, .hdb-faces .grid-wrap { height: auto !important; max-height: 36rem; min-height: 0 }
.hdb-faces .grid-wrap { max-height: 15rem }
.hdb-pictures .grid-container, .hdb-faces .grid-container {
  grid-template-columns: repeat(auto-fill, minmax(var(--cell), 1fr)) !important; grid-template-rows: none !important; grid-auto-rows: auto !important;
  padding: .3rem; gap: .5rem; max-width: none
}
.hdb-three .grid-container { grid-template-columns: repeat(3, minmax(0, 1fr)) !important }
.hdb-two .grid-container { grid-template-columns: repeat(2, minmax(0, 1fr)) !important }
.hdb-pictures .gallery-item, .hdb-faces .gallery-item { max-width: 14rem }
.hdb-faces .thumbnail-lg { aspect-ratio: 1; height: auto }
.hdb-pictures .thumbnail-lg { aspect-ratio: auto; height: auto; display: flex; flex-direction: column }
.hdb-pictures .thumbnail-lg img { aspect-ratio: 1; width: 100%; height: auto }
.hdb-pictures .caption-label {
  position: static; white-space: normal; max-width: 100%; padding: .3rem .4rem; border: 0; border-radius: 0; font-size: .75rem; line-height: 1.25; text-align: left
}
.hdb-pictures .empty, .hdb-faces .empty { min-height: 4rem !important; height: 4rem }
.gradio-container input[type=checkbox] { border-color: var(--body-text-color-subdued) }
#files .stem { white-space: normal; overflow: visible; overflow-wrap: anywhere }
#about code { white-space: normal; overflow-wrap: anywhere }
"""
"""The system's own fonts and colors that follow its light or dark setting; columns by the width that there is."""


def theme() -> gr.themes.Base:
    """A theme that loads nothing: Gradio's usual ones ask for fonts."""
    system = ["system-ui", "-apple-system", "Segoe UI", "sans-serif"]
    return gr.themes.Default(primary_hue="indigo", font=system, font_mono=["ui-monospace", "monospace"])


def build(actions: Actions) -> gr.Blocks:
    """The page over `actions`."""
    hdb = actions.hdb
    faces = sorted(toon.directory("faces").glob("face-*.png"))
    gr.set_static_paths([toon.directory("faces")])
    defaults = hdb.generate_config()
    identity = 0.0 if defaults.identity_guidance in ("off", None) else float(defaults.identity_guidance)
    # one at a time: a model carries one LoRA at a time
    job: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
    private: dict[str, Any] = {"api_visibility": "private"}

    with gr.Blocks(title="hyperdreambooth", analytics_enabled=False) as page:
        gr.Markdown(
            "# One face photo in, a personal LoRA out\n"
            f"Runs on this machine alone, on the base `{hdb.base}`; nothing you give it leaves it, and all of it goes when you close this page."
        )
        with gr.Tab("Make"):
            gr.Markdown("## 1. Your photo\nDrop in one photo of a person, or a few of the same person, or take an example face.")
            with gr.Row():
                with gr.Column(min_width=300):
                    uploaded = gr.Gallery(
                        label="Photos",
                        sources=["upload", "webcam", "clipboard"],
                        file_types=["image"],
                        type="filepath",
                        columns=4,
                        height=220,
                        elem_id="photos",
                    )
                    face = gr.Number(
                        1, label="Which face, where there are several", info="1 is the largest.", precision=0, minimum=1, elem_id="face"
                    )
                with gr.Column(min_width=300):
                    gr.Markdown("Example faces: drawn people whom nobody trained on")
                    examples = gr.Gallery(
                        [str(file) for file in faces],
                        show_label=False,
                        interactive=False,
                        allow_preview=False,
                        buttons=[],
                        object_fit="contain",
                        elem_id="examples",
                        elem_classes="hdb-faces",
                    )
                    number = gr.Number(visible=False)
            note = gr.HTML(bar("What is understood of the photo appears here."), elem_id="note")
            understood = gr.Gallery(
                show_label=False, interactive=False, buttons=[], object_fit="contain", elem_id="understood", elem_classes="hdb-pictures"
            )

            gr.Markdown("## 2. Personalize\nA prediction within seconds, then fine-tuning that makes it fit. *Stop* keeps what there is.")
            consent = gr.Checkbox(
                label="I am the person in the photo, or the person agrees", info="Example faces need no one's consent.", elem_id="consent"
            )
            fine_tuning = gr.Slider(
                0, 400, hdb.personalize_config().steps, step=1, label="Fine-tuning steps", info="0 keeps the prediction.", elem_id="steps"
            )
            with gr.Row():
                personalize = gr.Button("Personalize", variant="primary", elem_id="personalize")
                stop = gr.Button("Stop", elem_id="stop")
            progress = gr.HTML(elem_id="progress")
            previews = _pictures("previews")
            with gr.Accordion("Or go on with a LoRA or token file that you made earlier", open=False):
                earlier = gr.File(label="LoRA or token file", file_types=[".safetensors", ".tokens"], elem_id="earlier")

            gr.Markdown("## 3. Draw\nWrite prompts, a line each, with `[V]` where the person belongs, or tick some.")
            prompts = gr.Textbox(hdb.prompt, label="Prompts", lines=3, max_length=4000, elem_id="prompts")
            plain = [name for name, prompt in actions.palette["contexts"].items() if prompt == hdb.prompt]
            contexts = gr.CheckboxGroup(list(actions.palette["contexts"]), value=plain, label="Contexts", elem_id="contexts")
            styles = gr.CheckboxGroup(list(actions.palette["styles"]), label="Styles", elem_id="styles")
            with gr.Row():
                count = gr.Slider(1, 8, 1, step=1, label="Pictures of each", elem_id="count")
                seed = gr.Number(0, label="First seed", precision=0, minimum=0, maximum=2**53, elem_id="seed")
                strength = gr.Slider(
                    0, 1.5, 1, step=0.05, label="Identity strength", info="0 is the base without the person.", elem_id="strength"
                )
            with gr.Accordion("More settings", open=False):
                with gr.Row():
                    guidance = gr.Slider(1, 15, defaults.guidance, step=0.5, label="Prompt guidance", info="1 is none.")
                    identity_guidance = gr.Slider(0, 8, identity, step=0.25, label="Identity guidance", info="0 is none.")
                    denoising = gr.Slider(1, 100, defaults.steps, step=1, label="Denoising steps")
                scheduler = gr.Dropdown([("the base's own", ""), *SCHEDULERS], value="", label="Scheduler")
                style_loras = gr.File(label="Style LoRAs", file_count="multiple", file_types=[".safetensors"], elem_id="style-loras")
                style_weight = gr.Slider(0, 1.5, 0.7, step=0.05, label="Weight of the style LoRAs")
            with gr.Row():
                draw = gr.Button("Draw", variant="primary", elem_id="draw")
                compare = gr.Button("Compare without LoRA, prediction, fine-tuned", elem_id="compare")
                stop_drawing = gr.Button("Stop", elem_id="stop-drawing")
            drawing = gr.HTML(elem_id="drawing")
            pictures = _pictures("pictures")
            # a prompt a row: without the LoRA, the prediction where there is one, with the LoRA
            compared = _pictures("compared", "hdb-three" if hdb.source else "hdb-two")

            gr.Markdown(
                "## 4. Mix two people\nGive a second person; the mix is who is drawn from then on. Fine-tuning isn't in a mix of two predictions."
            )
            with gr.Row():
                second = gr.File(label="A photo, a LoRA or a token file", elem_id="second")
                with gr.Column():
                    numbers = [("none", 0), *((f"example face {i + 1}", i + 1) for i in range(len(faces)))]
                    second_example = gr.Dropdown(numbers, value=0, label="Or an example face", elem_id="second-example")
                    share = gr.Slider(0, 1, 0.5, step=0.05, label="From the first person to the second", elem_id="share")
                    mix = gr.Button("Mix", elem_id="mix")
            mixing = gr.HTML(elem_id="mixing")
            mixed = _pictures("mixed")

            gr.Markdown(
                "## 5. Take it home\n`person.safetensors` opens in diffusers, `person-kohya.safetensors` in A1111 and ComfyUI; put "
                f"`{hdb.prompt.replace('[V]', hdb.identifier)}` into the prompt there. The zip holds every picture and a contact sheet."
            )
            files = gr.File(label="Your files", file_count="multiple", interactive=False, elem_id="files")
        with gr.Tab("What the method did"):
            about = gr.Markdown("Personalize somebody first.", elem_id="about")
            layers = gr.BarPlot(
                x="layer",
                y="strength",
                color="block",
                tooltip="all",
                label="How strongly each layer is changed (Frobenius norm)",
                buttons=[],
                elem_id="layers",
            )
            losses = gr.LinePlot(x="step", y="loss", label="Loss of the fine-tuning", buttons=[], elem_id="losses")

        page.load(actions.enter, queue=False, **private)
        page.unload(actions.leave)
        uploaded.change(actions.look, [uploaded, face], [understood, note], api_name="look")
        face.change(actions.look, [uploaded, face], [understood, note], **private)
        examples.select(_chosen, None, number, queue=False, **private).then(actions.example, number, [understood, note], api_name="example")
        stop.click(actions.stop, None, progress, queue=False, api_name="stop")
        stop_drawing.click(actions.stop, None, drawing, queue=False, **private)
        for palette in (contexts, styles):
            palette.change(actions.pick, [contexts, styles, prompts], prompts, queue=False, **private)

        order = [prompts, seed, count, strength, guidance, identity_guidance, denoising, scheduler, style_loras, style_weight]
        jobs = [
            personalize.click(actions.begin, None, progress, queue=False, **private).success(
                actions.personalize, [fine_tuning, consent], [progress, previews], api_name="personalize", **job
            ),
            earlier.upload(actions.load, earlier, [progress, previews], api_name="load", **job),
            draw.click(actions.begin, None, drawing, queue=False, **private).success(
                actions.draw, [*order, gr.State(False)], [drawing, pictures], api_name="draw", **job
            ),
            compare.click(actions.begin, None, drawing, queue=False, **private).success(
                actions.draw, [*order, gr.State(True)], [drawing, compared], api_name="compare", **job
            ),
            mix.click(actions.mix, [second, second_example, share, consent], [mixing, mixed], api_name="mix", **job),
        ]
        for number_of, done in enumerate(jobs):
            show = private if number_of else {}
            done.success(actions.take, None, files, api_name="take", **show).then(
                actions.explain, None, [about, layers, losses], api_name="explain", **show
            )
    page.queue(max_size=100, default_concurrency_limit=2, status_update_rate=1, api_open=False)
    return page


def _pictures(name: str, columns: str = "") -> gr.Gallery:
    return gr.Gallery(
        show_label=False,
        interactive=False,
        object_fit="contain",
        buttons=["download", "fullscreen"],
        elem_id=name,
        elem_classes=["hdb-pictures", columns],
    )


def _chosen(event: gr.SelectData) -> int:
    """Which example face was clicked, from 1."""
    if not isinstance(event.index, int):
        raise InputError("click on one of the faces.")
    return event.index + 1
