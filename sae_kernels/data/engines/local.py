"""In this process."""

from ..extract.job import Job, Progress
from ..store import ActivationStore


def run(job: Job, progress: Progress) -> ActivationStore:
    recipe = job.make_recipe()
    facts = job.probe(recipe)
    writer = job.writer(facts)
    if writer.finished:
        return ActivationStore.open(job.store, job.storage_options)
    done = writer.done()
    progress.begin(facts, writer, len(done))
    job.run(recipe, facts, job.plan(facts).missing(done), writer.write, progress)
    return job.finish(writer, facts)
