"""Suggestions over HTTP: POST /v1/suggest, GET /healthz, and one page to try the models beside each other.

Nothing of a request is logged or kept. The server listens on loopback unless told otherwise and has no
authentication of its own: put a gateway in front of it before opening it to a network.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse
from pydantic import AfterValidator, BaseModel, Field

from tppo.core.common import console
from tppo.core.config import Recipe, Task, TuningAlgorithm
from tppo.core.device import generation_dtype
from tppo.core.models import load_policy
from tppo.core.run import RunFolder
from tppo.core.stages import DISPLAY, rl_stage
from tppo.core.text import Event, EventKind, normalise_query, parse_response
from tppo.core.web import LOOPBACK_NAMES, Text, address_of, is_loopback, listen, render_page, run_server, secure
from tppo.generate.engine import encode_history, generate

MAX_EVENTS = 100
MAX_TEXT_CHARS = 500


def _not_blank(text: str) -> str:
    if not normalise_query(text):
        raise ValueError("the text of an event must hold something other than white space")
    return text


class HistoryEvent(BaseModel, extra="forbid"):
    """One thing the user did."""

    kind: EventKind = "search"
    text: Annotated[Text, Field(min_length=1, max_length=MAX_TEXT_CHARS), AfterValidator(_not_blank)]


class SuggestRequest(BaseModel, extra="forbid"):
    """A history, oldest event first. Without `model` every model answers."""

    history: Annotated[list[HistoryEvent], Field(min_length=1, max_length=MAX_EVENTS)]
    model: Text | None = None
    num: Annotated[int | None, Field(ge=1)] = None


class Suggestion(BaseModel):
    """One model's answer. `problem` is set when the raw answer was unparseable; `queries` is what it held."""

    model: str
    queries: list[str]
    problem: str | None
    milliseconds: float
    events_used: int
    events_given: int


class Suggestions(BaseModel):
    """The answers of all models, by name."""

    suggestions: dict[str, Suggestion]


def create_app(
    models: Mapping[str, tuple[Any, Any]], task: Task, temperature: float, *, allowed_hosts: Sequence[str] = ("*",)
) -> FastAPI:
    """The application.

    Args:
        models: name -> (causal language model, tokenizer), in the order shown on the page.
        temperature: sampling temperature; 0 is greedy.
        allowed_hosts: values of the Host header to answer (`tppo.core.web.secure`).
    """
    assert models, "no model to serve"
    app = FastAPI(title="tppo", docs_url=None, redoc_url=None)  # the docs pages load scripts from elsewhere
    # Generation is CPU-bound and switches the model's mode: one request at a time.
    lock = threading.Lock()
    page = _page(list(models), task, temperature)

    @app.api_route("/", methods=["GET", "HEAD"], response_class=HTMLResponse, include_in_schema=False)
    async def index() -> str:
        return page

    # Asynchronous: an answer that waits for no thread, however many requests hold one.
    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz")
    async def healthz() -> dict[str, Any]:
        return {"status": "ok", "models": list(models), "num_queries": task.num_queries}

    @app.post("/v1/suggest", response_model=Suggestion | Suggestions)
    def suggest(request: SuggestRequest) -> Suggestion | Suggestions:
        if request.model is not None and request.model not in models:
            raise _invalid("model", f"unknown model; this server has {', '.join(models)}")
        if request.num is not None and request.num > task.num_queries:
            raise _invalid("num", f"the models write at most {task.num_queries} queries")
        history = [Event(event.kind, normalise_query(event.text)) for event in request.history]
        names = list(models) if request.model is None else [request.model]
        with lock:
            answers = {name: _suggest(name, *models[name], history, task, temperature) for name in names}
        for answer in answers.values():
            answer.queries = answer.queries[: request.num]
        return Suggestions(suggestions=answers) if request.model is None else answers[request.model]

    secure(app, allowed_hosts)
    return app


def _suggest(name: str, model: Any, tokenizer: Any, history: list[Event], task: Task, temperature: float) -> Suggestion:
    start = time.perf_counter()
    prompt, dropped = encode_history(tokenizer, history, task)
    limit = task.max_response_tokens
    [generation] = generate(model, tokenizer, [prompt], max_new_tokens=limit, temperature=temperature)
    parsed = parse_response(generation.response, generation.finished, task.num_queries)
    return Suggestion(
        model=name,
        queries=parsed.queries,
        problem=parsed.problem,
        milliseconds=round((time.perf_counter() - start) * 1000, 1),
        events_used=min(len(history), task.history_events) - dropped,
        events_given=len(history),
    )


def _invalid(field: str, message: str) -> RequestValidationError:
    return RequestValidationError([{"type": "value_error", "loc": ("body", field), "msg": message}])


def _page(names: list[str], task: Task, temperature: float) -> str:
    facts = {
        "models": [{"name": name, "label": DISPLAY.get(name, name)} for name in names],
        "num_queries": task.num_queries,
        "random": temperature > 0,
        "history_events": task.history_events,
        "max_events": MAX_EVENTS,
        "max_text_chars": MAX_TEXT_CHARS,
    }
    return render_page(Path(__file__).parent / "page.html", facts)


def serve(recipe: Recipe) -> None:
    """Serve SFT and every finished tuned model of the run folder until interrupted.

    Raises:
        UserError: SFT is not finished, or the port cannot be had.
    """
    run = RunFolder(recipe)
    folders = {"sft": run.require_for_task("sft") / "model"}
    for algorithm in reversed(get_args(TuningAlgorithm)):
        stage = rl_stage(algorithm)
        if run.manifest(stage) is None:
            console.print(f"serve: {DISPLAY[algorithm]} is not trained in {run.root}, so it is left out")
        else:
            folders[algorithm] = run.require_for_task(stage) / "model"
    loopback = is_loopback(recipe.serve.host)
    with listen(recipe.serve.host, recipe.serve.port) as listener:
        if not loopback:
            console.print(
                f"[bold red]WARNING[/]: listening on {recipe.serve.host}: anyone who can reach this machine "
                "can use the models. There is no password and no encryption; --serve.host 127.0.0.1 keeps it "
                "to yourself."
            )
        dtype = generation_dtype(recipe.rl.precision)
        models = {name: load_policy(folder, dtype=dtype, task=recipe.task) for name, folder in folders.items()}
        hosts = [*LOOPBACK_NAMES, recipe.serve.host] if loopback else ["*"]
        app = create_app(models, recipe.task, recipe.serve.temperature, allowed_hosts=hosts)
        console.print(f"serving {', '.join(DISPLAY[n] for n in models)} on {address_of(listener)} (Ctrl+C stops)")
        run_server(app, listener)
