"""`tppo study`: make what is not made yet, one job after the other or several at a time, then collect and report.

Resumable at any point: a stage folder is finished or taken up again (see `tppo.core.run`), so the same command goes on.
When only the study itself was killed, the next one waits for the stage still at work instead of writing beside it.
"""

from __future__ import annotations

import os
import queue
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from functools import partial
from pathlib import Path

from tppo.core.common import UserError, console
from tppo.core.config import Recipe
from tppo.core.folders import check_removable
from tppo.core.pipeline import check_sections, run_stages, write_recipe
from tppo.core.processes import Children, locked
from tppo.core.run import RunFolder
from tppo.core.stages import all_stages
from tppo.judge.llm import LLMJudge
from tppo.study.grid import BASE, Job, Plan, describe, make_plan


def run_study(recipe: Recipe, redo: Sequence[str] = ()) -> None:
    """Do what `study.action` says.

    Args:
        redo: stages to make anew in every run folder of the study, with all that follows from them.

    Raises:
        UserError: a setting that cannot be, a shared stage that stopped, or cells that failed (after the others and
            the report were made).
    """
    plan = planned(recipe)
    if unknown := set(redo) - plan.stage_counts().keys():
        raise UserError(f"--redo {sorted(unknown)}: this study makes {sorted(plan.stage_counts())}")
    if recipe.study.action == "plan":
        print("\n".join(describe(plan)))
        return
    if recipe.study.action == "run":
        check_readers(make_plan(recipe, {}) if plan.search_of else plan)
        # A setting's own mistakes fail its own cells.
        check_sections(recipe, [name for name in all_stages(recipe) if name not in recipe.stage_dirs], data=False)
        workers = worker_environments(recipe.study.workers)
        with locked(Path(recipe.run_dir), wait=True) as children:
            check_taken(recipe)
            discard(plan, redo)
            if not stale_jobs(plan):  # else it would say other settings than what is finished has
                write_recipe(RunFolder(recipe))
            first = make_plan(recipe)
            failed = run_plan(first, workers, children)
            plan = planned(recipe)
            # What a search chooses is read when it has chosen.
            left = [job for job in plan.readings if job.name not in {one.name for one in first.readings}]
            failed |= run_jobs(left, workers, children)
    else:
        failed = stale_jobs(plan)
    from tppo.study.report import write_report  # here: training needs no charts

    page = write_report(recipe, plan, failed)
    if page:
        console.print(f"report: {page}", soft_wrap=True)
    if failed:
        listed = "".join(f"\n  {name}: {reason}" for name, reason in failed.items())
        raise UserError(f"{len(failed)} of {len(plan.jobs)} run folders failed; what is finished stays valid:{listed}")


def planned(recipe: Recipe) -> Plan:
    """The plan of a study, with what its search chose once that is finished."""
    plan = make_plan(recipe)
    if not plan.search_of:
        return plan
    from tppo.study.search import choose, searched  # here: training needs no charts

    found = searched(plan, stale_jobs(plan))
    return plan if found is None else make_plan(recipe, choose(found))


def check_readers(plan: Plan) -> None:
    """Refuse, before anything runs, readings that no judge could give.

    Raises:
        UserError: names the setting of section `judge`.
    """
    for (*_, reader), job in plan.reading_of.items():
        try:
            if reader in ("llm", "vote"):
                LLMJudge(job.recipe.judge)
        except UserError as error:
            setting = "" if job.setting == BASE else f"study.settings '{job.setting}': "
            raise UserError(f"{setting}evaluate.readings: {reader} asks the LLM judge: {error}") from None


def discard(plan: Plan, redo: Sequence[str]) -> None:
    """Delete these stages in every run folder of the study, and all that follows from them.

    Raises:
        UserError: one of the folders holds what no stage has made; nothing is deleted then.
    """
    for job in plan.jobs if redo else ():
        for name in job.run.followers(redo):
            check_removable(job.run.path(name), name)
    for job in plan.jobs if redo else ():
        job.run.discard_from(*redo)
    for job in plan.readings if redo else ():
        (stage,) = job.stages
        if job.run.missing_inputs(stage):
            job.run.discard_from(stage)


def stale_jobs(plan: Plan) -> dict[str, str]:
    """Run folders whose finished stages were made with other settings or inputs, and what changed."""
    stale = {}
    for job in plan.jobs:
        try:
            job.finished()
        except UserError as error:
            stale[job.name] = str(error)
    return stale


def check_taken(recipe: Recipe) -> None:
    """The stages a recipe takes from elsewhere are finished, with its settings.

    Raises:
        UserError: names the stage.
    """
    run = RunFolder(recipe)
    for stage in recipe.stage_dirs:
        if not run.is_done(stage):
            run.check_own(stage)


def run_plan(plan: Plan, workers: Sequence[Mapping[str, str]], children: Children) -> dict[str, str]:
    """Run all jobs, `len(workers)` at a time; returns why those failed that did, by name.

    Args:
        workers: what each worker's processes have in their environment beside this one's (`worker_environments`).
        children: of the study; they end with it.

    Raises:
        UserError: the shared stages of the recipe itself failed, on which everything rests.
    """
    first = [job for job in plan.shared if job.setting == BASE]
    for name, reason in run_jobs(first, workers, children).items():
        raise UserError(f"{name}: {reason}")
    return run_jobs([job for job in plan.jobs if job not in first], workers, children)


def run_jobs(jobs: Sequence[Job], workers: Sequence[Mapping[str, str]], children: Children) -> dict[str, str]:
    """Run jobs, each after those it needs; returns why those failed that did, by name."""
    free: queue.Queue[Mapping[str, str]] = queue.Queue()
    for worker in workers:
        free.put(worker)
    futures: dict[Future[None], Job] = {}
    failed: dict[str, str] = {}

    def work(number: int, job: Job, needed: list[Future[None]]) -> None:
        wait(needed)  # submitted earlier, so at work or done: no worker waits for a job behind it
        worker = free.get()
        try:
            call = partial(_call, children, Path(job.recipe.run_dir), worker)
            run_stages(job.recipe, job.stages, call, f"{number}/{len(jobs)} {job.name} ", wait=True)
        finally:
            free.put(worker)

    with ThreadPoolExecutor(max_workers=len(workers)) as pool:
        for number, job in enumerate(jobs, start=1):
            needed = [future for future, other in futures.items() if job.needs(other)]
            futures[pool.submit(work, number, job, needed)] = job
        try:
            for future in as_completed(futures):
                name = futures[future].name
                try:
                    future.result()
                except UserError as error:  # any other error is a bug, and raised
                    failed[name] = str(error)
                    console.print(f"{name} failed: {error}", style="red", markup=False, soft_wrap=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            children.stop()
            raise
    return {job.name: failed[job.name] for job in jobs if job.name in failed}


def _call(children: Children, folder: Path, worker: Mapping[str, str], command: list[str]) -> int:
    """Run a stage with its output in a log of the job's folder.

    Raises:
        UserError: it stopped; with the last line of its log.
    """
    stage = command[3]  # python -m tppo STAGE
    log = folder / f"{stage}.log"
    with log.open("wb") as output:
        status = children.call(command, env={**os.environ, **worker}, stdout=output, stderr=output)
    if status:
        said = log.read_text(encoding="utf-8", errors="replace").strip().rsplit("\n", 1)[-1].strip()
        raise UserError(f"{stage} stopped (exit status {status}): {said[:300] or 'it said nothing'} (all of it: {log})")
    return 0


def worker_environments(workers: int) -> list[dict[str, str]]:
    """What each worker's processes have in their environment: one GPU each of those this process may see, or without
    any GPU an equal share of the CPU threads.

    Raises:
        UserError: fewer GPUs than workers, or without a GPU fewer threads.
    """
    if workers == 1:
        return [{}]
    import torch  # here: only this question needs it

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        gpus = [str(number) for number in range(torch.cuda.device_count())]
    else:
        gpus = [name for name in visible.split(",") if name]
    if gpus:
        if workers > len(gpus):
            raise UserError(f"study.workers={workers}, but {len(gpus)} GPUs are to be seen: give at most one a GPU")
        return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus[:workers]]
    threads = torch.get_num_threads()
    if workers > threads:
        raise UserError(f"study.workers={workers}, but without a GPU there are {threads} CPU threads to share")
    # More threads than cores make every one of them wait for the others at each operation.
    return [{"OMP_NUM_THREADS": str(threads // workers)} for _ in range(workers)]
