"""Ray Data: an actor with a model of its own for each worker; placing, retrying and scaling them is Ray's work."""

from typing import Any

from ..._need import need
from ..extract.job import Facts, Job, Progress
from ..store import ActivationStore
from ..store.shards import Parts


class Shards:
    """The actor: makes the shards whose numbers it is given."""

    def __init__(self, job: Job, facts: Facts) -> None:
        self.job, self.facts, self.recipe, self.writer = job, facts, job.make_recipe(), job.writer(facts)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        rows = []

        def write(number: int, parts: Parts, dropped: int) -> None:
            rows.append(self.writer.write(number, parts, dropped).rows)

        self.job.run(self.recipe, self.facts, batch["shard"].tolist(), write)
        return {"shard": batch["shard"], "rows": rows}


def run(job: Job, progress: Progress, workers: int = 1, gpus: float = 0) -> ActivationStore:
    """workers: actors, gpus: of each. Uses the Ray cluster of ray.init() or RAY_ADDRESS, else starts one here.

    The store must be where all machines see it. ValueError for inputs that cannot be sought.
    """
    ray, data = need("ray", "engine='ray'", "ray"), need("ray.data", "engine='ray'", "ray")
    if not job.inputs.seekable:
        raise ValueError(f"engine='ray' needs inputs that can be sought, got {type(job.inputs).__name__}")
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    ray.init(ignore_reinit_error=True, log_to_driver=False, logging_level="error")
    data.DataContext.get_current().enable_progress_bars = False
    # this process may have no GPU: the first batch runs where there is one
    facts = ray.get(ray.remote(num_gpus=gpus)(_probe).remote(job)) if gpus else _probe(job)
    writer = job.writer(facts)
    if writer.finished:
        return ActivationStore.open(job.store, job.storage_options)
    plan, done = job.plan(facts), writer.done()
    progress.begin(facts, writer, len(done))
    todo = [{"shard": number} for number in plan.missing(done)]
    if todo:
        made = data.from_items(todo, override_num_blocks=len(todo)).map_batches(
            Shards,
            fn_constructor_args=(job, facts),
            batch_size=1,
            num_gpus=gpus or None,
            compute=data.ActorPoolStrategy(size=min(workers, len(todo)), max_tasks_in_flight_per_actor=1),
        )
        for row in made.iter_rows():
            progress(row["rows"], row["rows"] * facts.row_bytes, plan.batches_per_shard)
    return job.finish(writer, facts)


def _probe(job: Job) -> Facts:
    return job.probe(job.make_recipe())
