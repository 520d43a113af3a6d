"""The handlers of the page's buttons and of Gradio's API, on top of the Python API.

Long jobs are generators, whose results are shown as they are yielded. A model holds one LoRA at a time, so all work on it runs in a single
thread, that of `Actions.submit`. This also saves the threads and memory that torch takes for each thread that calls it. Errors of visitors
are shown to them in one sentence; all others are logged.
"""

from __future__ import annotations

import queue
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image
from torch import Tensor

from .. import photos, replay
from ..api import HyperDreamBooth
from ..assets import toon
from ..errors import InputError, NoFaceError
from ..lora import LoraSet
from ..personal_lora import PersonalLora
from ..progress import format_duration
from ..settings import GenerateConfig
from .replies import bar, in_one_sentence
from .sessions import COOKIE, Picture, Visit, Visits

Shown = list[tuple[str, str]]  # The value of a gallery: (file, caption) of each picture.
Opener = Callable[[str], HyperDreamBooth]
MAX_PHOTOS = 8
COLUMNS = 4  # Pictures in a row of the contact sheet.
MAX_PICTURES = 48  # Pictures in one call of `draw`.
KEPT = 200  # Pictures kept for a visit; the oldest are deleted.


def check_consent(given: bool) -> None:
    if not given:
        raise InputError("tick that you are the person in the photo or that the person agrees. Faces are personal.")


def example_face(number: float) -> Image.Image:
    """Example face `number`, from 1. Raises InputError if there is none of that number."""
    if not 1 <= number <= len(toon.faces()):
        raise InputError(f"there is no example face {int(number)}. Take one of those that are shown.")
    return photos.load_photo(toon.faces()[int(number) - 1])


class Actions:
    """The actions, each for the visit that its request comes from.

    Args:
        hdb: the base with which a visit begins.
        open_base: opens another base by name; one base is in memory at a time.
        bases: names of other bases that a visit may choose; with `any_base` it may choose any name or path.
    """

    def __init__(
        self, hdb: HyperDreamBooth, visits: Visits, open_base: Opener | None = None, bases: Sequence[str] = (), any_base: bool = False
    ):
        self.opened, self.visits, self.open_base = {hdb.base: hdb}, visits, open_base
        self.bases, self.any_base = [hdb.base, *bases], any_base
        self.submit: Callable[..., Future[Any]] = ThreadPoolExecutor(1, thread_name_prefix="model").submit
        self.palette = toon.palette()

    def visit(self, request: gr.Request) -> Visit:
        return self.visits.of(request.session_hash, request.request.cookies.get(COOKIE) if request.request else None)

    def without_folders(self, text: str) -> str:
        """A message without the server's folders, in the terms of the page: files are given by name only."""
        for word in text.split():
            if str(self.visits.root) in word:
                text = text.replace(word, Path(word).name)
        return text.replace("--face N takes another", "change the face's number")

    def model(self, name: str) -> HyperDreamBooth:
        """The base `name` ("": the first one), opened if it isn't in memory, in place of the other. Only for the model's thread."""
        name = name or self.bases[0]
        if name not in self.opened and self.open_base:
            self.opened.clear()
            replay.forget()
            self.opened[name] = self.open_base(name)
        return self.opened[name]

    def hdb(self, visit: Visit) -> HyperDreamBooth:
        return self._on_model(self.model, visit.base)

    @in_one_sentence
    def choose(self, name: str, request: gr.Request) -> HyperDreamBooth:
        """Chooses the base of this visit. Forgets its photos and person, whose LoRA fits the previous base only."""
        visit = self.visit(request)
        if not name or not (self.any_base or name in self.bases):
            raise InputError(f"this page has the bases {', '.join(self.bases)}. Start it with --bases for others.")
        if visit.busy:
            raise InputError("something is running still. Stop it first.")
        hdb: HyperDreamBooth = self._on_model(self.model, name)
        visit.base, visit.needs_consent = name, True
        visit.personalized = visit.person = visit.pixels = None
        return hdb

    def _on_model(self, work: Callable[..., Any], *args: Any, **more: Any) -> Any:
        return self.submit(work, *args, **more).result()

    @in_one_sentence
    def enter(self, request: gr.Request) -> None:
        """Begins a visit as the page loads, so that closing another tab of the same visitor keeps its uploads."""
        self.visit(request)

    def leave(self, request: gr.Request) -> None:
        self.visits.end(request.session_hash)

    @in_one_sentence
    def stop(self, request: gr.Request) -> str:
        """Stops the running or waiting job after its current step; results so far are kept."""
        visit = self.visit(request)
        visit.stop.set()
        return bar("Stopping after this step ..." if visit.busy else "Nothing is running; what waits won't begin.")

    @in_one_sentence
    def begin(self, request: gr.Request) -> str:
        """Runs before a job waits for its turn: clears a request to stop an earlier job."""
        self.visit(request).stop.clear()
        return bar("Waiting for a turn ...")

    @in_one_sentence
    def look(self, uploaded: list[tuple[str, str | None]] | None, face: float | None, request: gr.Request) -> tuple[Any, Any]:
        """The cropped photos, as the method will get them, and a message about them."""
        visit = self.visit(request)
        if not uploaded and not visit.needs_consent:  # an example face was chosen, and stays
            return gr.skip(), gr.skip()
        visit.pixels, visit.needs_consent = None, True
        if not uploaded:
            return [], bar("What is understood of the photo appears here.")
        if len(uploaded) > MAX_PHOTOS:
            raise InputError(f"{len(uploaded)} photos are more than {MAX_PHOTOS}. Take the best ones.")
        which = int(face) if face and face > 1 else None
        with visit.detecting:
            hdb = self.hdb(visit)
            seen = [self._crop(file, hdb.backbone.size, which) for file, _ in uploaded]
            visit.pixels = pixels = photos.to_tensor([image for image, _ in seen])
        warning = self._on_model(lambda: hdb.unlike(hdb.backbone.encode_images(pixels).float()))
        return [(str(visit.save(image)), "") for image, _ in seen], bar(" ".join([*(note for _, note in seen), warning]).strip())

    def _crop(self, file: str, size: int, face: int | None = None) -> tuple[Image.Image, str]:
        """A photo cropped to its face, or to the center if none is found, and a sentence on the choice."""
        name = Path(file).name
        try:
            image, note = photos.prepare(file, size, "face", face)
            return image, self.without_folders(note) or f"{name}: {'one face was found' if face is None else f'face {face} is taken'}."
        except NoFaceError:
            why = "no face was found, so the middle of the picture is taken. A frontal photo works best."
            return photos.prepare(file, size, "center")[0], f"{name}: {why}"

    @in_one_sentence
    def example(self, number: float, request: gr.Request) -> tuple[Shown, str]:
        """Takes an example face, by its number from 1. It is of no real person, so no consent is needed."""
        visit = self.visit(request)
        image = example_face(number)
        visit.pixels, _ = self.hdb(visit).read_photos(image)
        visit.needs_consent = False
        return [(str(visit.save(image)), "")], bar(f"Example face {int(number)}: a person that nothing here was trained on.")

    def pick(self, contexts: list[str], styles: list[str], prompts: str) -> str:
        """The prompts, one a line: those that the visitor wrote, then those ticked in the palette."""
        palette = {**self.palette["contexts"], **self.palette["styles"]}
        own = [line for line in prompts.splitlines() if line.strip() and line.strip() not in palette.values()]
        return "\n".join([*own, *(palette[name] for name in [*contexts, *styles])])

    @in_one_sentence
    def personalize(self, steps: float, consent: bool, request: gr.Request) -> Iterator[tuple[str, Shown]]:
        """Predicts a LoRA, fine-tunes it, and shows previews of each stage. A stopped job keeps its results so far."""
        visit = self.visit(request)
        if visit.stop.is_set():
            visit.stop.clear()
            yield bar("Stopped before it began."), []
            return
        with visit.detecting:  # waits for a face detection that is still running
            pixels = visit.pixels
        if pixels is None:
            raise InputError("there is no photo yet. Drop one in, or take an example face.")
        check_consent(consent or not visit.needs_consent)
        hdb = self.hdb(visit)
        total = hdb.personalize_config(steps=int(steps)).steps
        if hdb.source is None and not total:
            raise InputError("0 steps leave nothing where there is no hypernetwork. Choose more steps.")
        with visit.job():
            shown: Shown = []
            if hdb.source is not None:
                yield bar("Predicting ..."), []
                visit.personalized = visit.person = me = self._on_model(hdb.personalize, pixels, steps=0, quiet=True)
                shown += self._on_model(self._preview, visit, me, "prediction")
                yield bar("This is the prediction."), shown
            if total and not visit.stop.is_set():
                yield from self._fine_tune(visit, pixels, total, shown)
            me = visit.person
            if me is None:
                raise InputError("it was stopped before there was anything to keep.")
            done, seconds = me.metadata.get("hyperdreambooth.steps", 0), sum(me.seconds.values())
            yield bar(f"Done: {done} steps in {seconds:.0f} s. Draw the person below, or take the LoRA home (rank {me.rank})."), shown

    def _preview(self, visit: Visit, person: PersonalLora | LoraSet, label: str) -> Shown:
        """A picture of the person with the base's plain prompt. Only for the model's thread."""
        hdb = self.model(visit.base)
        return [(self._draw_one(visit, person, Picture(hdb.prompt, 0, label), hdb.generate_config()), label)]

    def _fine_tune(self, visit: Visit, pixels: Tensor, total: int, shown: Shown) -> Iterator[tuple[str, Shown]]:
        """Fine-tunes and yields the status of each step, with a preview each quarter. Closing the generator stops the job."""
        news: queue.Queue[tuple[int, Shown] | None] = queue.Queue()
        started = time.monotonic()

        def on_step(done: int, loras: LoraSet) -> bool:
            quarter = done % max(1, total // 4) == 0 and done < total
            news.put((done, self._preview(visit, loras, f"step {done}") if quarter else []))
            return visit.stop.is_set()

        job = self.submit(self.hdb(visit).personalize, pixels, steps=total, on_step=on_step, quiet=True)
        job.add_done_callback(lambda _: news.put(None))
        try:
            yield bar("Fine-tuning ...", 0, total), shown
            for done, preview in iter(news.get, None):
                shown += preview
                left = (time.monotonic() - started) / done * (total - done)
                yield bar(f"Fine-tuning: step {done} of {total}, about {format_duration(left)} left", done, total), shown
            visit.personalized = visit.person = me = job.result()
            shown += self._on_model(self._preview, visit, me, "fine-tuned")
        finally:  # also when the tab was closed, which closes this generator
            visit.stop.set()
            wait([job])

    @in_one_sentence
    def load(self, file: str | None, request: gr.Request) -> tuple[str, Shown]:
        """Loads a LoRA or a token file that was made earlier."""
        visit = self.visit(request)
        if not file:
            return "", []
        visit.personalized = visit.person = me = self._on_model(self.hdb(visit).load, file)
        shown = self._on_model(self._preview, visit, me, "loaded")
        return bar(f"Loaded {Path(file).name}: rank {me.rank}, {len(me.loras)} layers."), shown

    @in_one_sentence
    def mix(self, file: str | None, example: int | None, share: float, consent: bool, request: gr.Request) -> tuple[str, Shown]:
        """Mixes in a second person with the weight `share`, 0 to 1: from a photo, a LoRA, a token file or an example face."""
        visit = self.visit(request)
        if visit.personalized is None:
            raise InputError("there is nobody to mix yet. Personalize somebody first.")
        if not file and not example:
            raise InputError("there is no second person yet. Give a photo, a LoRA or a token file, or the number of an example face.")
        photo = file and Path(file).suffix.lower() in photos.SUFFIXES
        check_consent(consent or not photo)
        hdb = self.hdb(visit)
        if file and not photo:
            second = self._on_model(hdb.load, file)
        else:
            face = photos.to_tensor([self._crop(file, hdb.backbone.size)[0]]) if file else example_face(example or 1)
            second = self._on_model(hdb.personalize, face, steps=0, quiet=True)
        visit.person = self._on_model(hdb.mix, [(visit.personalized, 1 - share), (second, share)])
        shown = self._on_model(self._preview, visit, visit.person, f"{100 * share:.0f} % the second person")
        return bar("The mix is who is drawn now. Slide to 0 for the first person alone."), shown

    @in_one_sentence
    def draw(
        self,
        prompts: str,
        seed: float,
        count: float,
        styles: list[str] | None,
        style_weight: float,
        compare: bool,
        request: gr.Request,
        **settings: Any,
    ) -> Iterator[tuple[str, Shown]]:
        """Draws every prompt (one a line) `count` times; each picture is shown as soon as it is made.

        Args:
            compare: also draws without the LoRA and, if there is one, with the prediction alone, from the same seed.
            settings: strength, guidance, identity (guidance; 0 is off), steps, scheduler ("" is the base's own).
        """
        visit = self.visit(request)
        wanted = [line.strip() for line in prompts.splitlines() if line.strip()]
        if not wanted:
            raise InputError("there is no prompt. Write one, or pick some from the palette.")
        if visit.person is None and not compare:
            raise InputError("there is nobody to draw yet. Personalize somebody, or load a LoRA.")
        who: list[tuple[str, PersonalLora | LoraSet | None]] = [("", visit.person)]
        if compare:
            there = {"prediction": visit.person and visit.person.predicted, "with the LoRA": visit.person}
            who = [("without the LoRA", None), *((label, person) for label, person in there.items() if person)]
        orders = [(Picture(prompt, int(seed) + i, label), person) for prompt in wanted for i in range(int(count)) for label, person in who]
        if len(orders) > MAX_PICTURES:
            raise InputError(f"{len(orders)} pictures are more than {MAX_PICTURES}. Ask for fewer prompts or fewer pictures of each.")
        settings |= {"steps": int(settings["steps"]), "scheduler": settings["scheduler"] or None}
        config = self.hdb(visit).generate_config(identity_guidance=settings.pop("identity") or "off", **settings)
        files = [(file, style_weight) for file in styles or []]
        shown: Shown = []
        finished = "{} of {} pictures. Each says in its metadata how it was made, and that it is generated."
        with visit.job():
            yield bar("Drawing ...", 0, len(orders)), shown
            for picture, person in orders:
                if visit.stop.is_set():
                    break
                file = self._on_model(self._draw_one, visit, person, picture, config, files)
                shown.append((file, f"{picture.label}: " * bool(picture.label) + f"{picture.prompt} (seed {picture.seed})"))
                yield bar(f"{len(shown)} of {len(orders)} pictures", len(shown), len(orders)), shown
            yield bar(finished.format(len(shown), len(orders))), shown

    def _draw_one(
        self, visit: Visit, person: PersonalLora | LoraSet | None, picture: Picture, config: GenerateConfig, styles: list[Any] | None = None
    ) -> str:
        """Draws and writes a picture, and deletes the oldest beyond `KEPT`. Only for the model's thread."""
        hdb, prompt, seed = self.model(visit.base), picture.prompt, picture.seed
        image = hdb.generate(prompt, person, seed=seed, styles=styles or [], config=config)[0]
        used = [("person", config.strength)] * bool(person) + [(Path(file).name, weight) for file, weight in styles or []]
        name = "-".join(part for part in (prompt.replace("[V]", "person"), picture.label, f"seed {seed}") if part)
        picture.file = visit.new_folder() / ("".join(c if c.isalnum() else "-" for c in name)[:80] + ".png")
        photos.save_png(image, picture.file, hdb.picture_metadata(prompt, seed, config, used))
        visit.pictures.append(picture)
        for old in visit.pictures[:-KEPT]:
            old.file.unlink(missing_ok=True)
        del visit.pictures[:-KEPT]
        return str(picture.file)

    @in_one_sentence
    def take(self, request: gr.Request) -> list[str]:
        """The files to download: the LoRA (for bases with a UNet also in kohya's layout), the tokens, and a zip of all pictures."""
        visit = self.visit(request)
        folder, files = visit.new_folder(), []
        if (me := visit.person) is not None:
            files.append(me.save(folder / "person.safetensors"))
            if "transformer" not in self.hdb(visit).backbone.components:  # kohya's layout has no names for its layers
                files.append(me.save(folder / "person-kohya.safetensors", layout="kohya"))
            files += [me.save_tokens(folder / "person.tokens")] if me.tokens is not None else []
        if visit.pictures:
            rows = [visit.pictures[i : i + COLUMNS] for i in range(0, len(visit.pictures), COLUMNS)]
            labels = [" | ".join(f"{picture.label or picture.prompt} ({picture.seed})" for picture in row) for row in rows]
            sheet = photos.grid([[photos.load_photo(picture.file) for picture in row] for row in rows], labels, [""] * COLUMNS)
            files.append(folder / "pictures.zip")
            with zipfile.ZipFile(files[-1], "w") as archive:
                archive.write(photos.save_png(sheet, folder / "contact-sheet.png", {"ai_generated": "true"}), "contact-sheet.png")
                for index, picture in enumerate(visit.pictures, 1):
                    archive.write(picture.file, f"{index:03d}-{picture.file.name}")
        for old in visit.downloads.iterdir() if visit.downloads else ():
            old.unlink(missing_ok=True)
        visit.downloads = folder
        return [str(file) for file in files]
