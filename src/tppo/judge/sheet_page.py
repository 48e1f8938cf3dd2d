"""The sheet as a page on this machine: one response at a time, words and response answered by click or key.

The page shows what sheet.csv shows and writes into the same file, whole, after every answer: closing the page or
killing the server loses nothing, and the next start goes on with the first response not finished. Loopback
only: a sheet holds people's searches.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse

from tppo.config import Agreement
from tppo.errors import UserError
from tppo.judge.sheet import SHEET, ItemAnswers, SheetKey, blank_answers, read_key, read_sheet, write_sheet
from tppo.progress import console
from tppo.serve.http import LOOPBACK_NAMES, address_of, listen, render_page, run_server, secure


def create_app(key: SheetKey, path: Path) -> FastAPI:
    """The application that fills in the sheet at `path`.

    The file is read again for every request, so a label typed into it meanwhile is kept. GET /v1/sheet returns
    the items with their answers, PUT /v1/items/{number} (from 0) replaces one item's answers. A sheet that no
    longer fits its key is answered with 409 and the reason.
    """
    app = FastAPI(title="tppo agreement", docs_url=None, redoc_url=None)  # the docs pages load scripts from elsewhere
    lock = threading.Lock()  # FastAPI runs the handlers in threads; an answer is read, changed and written as one
    page = render_page(
        Path(__file__).parent / "sheet.html", {"rubric": key.rubric, "file": path.name, "items": len(key.items)}
    )

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    def index() -> str:
        return page

    @app.get("/v1/sheet")
    def sheet() -> dict[str, Any]:
        with lock:
            answers = read_sheet(path, key)
        return {
            "items": [
                {"against": item.against, "queries": item.queries, "answers": given.model_dump()}
                for item, given in zip(key.items, answers, strict=True)
            ]
        }

    @app.put("/v1/items/{number}")
    def save(number: int, given: ItemAnswers) -> dict[str, bool]:
        if not 0 <= number < len(key.items):
            raise HTTPException(404, f"there is no item {number}; the sheet has {len(key.items)}")
        if len(given.words) != len(key.items[number].words):
            raise HTTPException(422, f"item {number} has {len(key.items[number].words)} words, not {len(given.words)}")
        with lock:
            answers = read_sheet(path, key)
            answers[number] = given
            write_sheet(path, key, answers)
        return {"saved": True}

    @app.exception_handler(UserError)
    def spoilt(request: Request, error: UserError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, status_code=409)

    secure(app, LOOPBACK_NAMES)
    return app


def serve_sheet(folder: Path, settings: Agreement) -> None:
    """Serve the page for one person until interrupted.

    Answers go into the sheet named in `agreement.answers` (made blank if it does not exist), or the exported one.

    Raises:
        UserError: no sheet was exported; several sheets are named; the sheet is spoilt; the port is taken.
    """
    if len(settings.answers) > 1:
        raise UserError(f"agreement.answers names {len(settings.answers)} sheets, but a page fills in one: give one")
    key = read_key(folder)
    path = Path(settings.answers[0]) if settings.answers else folder / SHEET
    if not path.exists():
        write_sheet(path, key, blank_answers(key))
    read_sheet(path, key)
    listener = listen("127.0.0.1", settings.port, "agreement")
    try:
        console.print(f"answer on {address_of(listener)}, saved in {path} (Ctrl+C stops)", soft_wrap=True)
        run_server(create_app(key, path), listener)
    finally:
        listener.close()
