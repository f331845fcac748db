"""SLURM with munge on two nodes: a job, a job that is cancelled, a job that requeues itself, a job array."""

import re

import pytest

from cluster.conftest import SMALL, wait_for
from helpers import ROOT

pytestmark = pytest.mark.cluster

# Requeues itself when the run has saved and stopped; docs/cluster.md shows the same lines.
JOB = f"""#!/bin/bash
#SBATCH --nodes=2 --requeue --open-mode=append
{ROOT}/launch.sh "$@"
[ $? != 75 ] || scontrol requeue "$SLURM_JOB_ID"
"""
# scancel signals the script too: this one lives to say how the run ended.
CANCELLED = f"""#!/bin/bash
#SBATCH --nodes=2
trap : TERM
{ROOT}/launch.sh "$@"
echo "status $?"
"""


class Job:
    def __init__(self, cluster, log: str, *words: str, options: tuple[str, ...] = (), script: str = JOB, **env: str):
        self.cluster, self.log = cluster, log
        file = cluster.folder / f"{log}.sh"
        file.write_text(script)
        submit = ("sbatch", "--parsable", f"--output={cluster.folder / log}", *options, str(file), *words)
        self.id = cluster.on("node-a", *submit, CPU_RANKS="1", **env)

    @property
    def state(self) -> str:
        return re.search(r"JobState=(\w+)", self.cluster.on("node-a", "scontrol", "show", "job", self.id))[1]

    def wait(self) -> str:
        """The state in which the job has ended, all of its processes too."""
        queue = ("squeue", "--noheader", f"--jobs={self.id}")
        wait_for(f"job {self.id} ends", lambda: not self.cluster.on("node-a", *queue))
        return self.state

    def wait_for(self, pattern: str) -> None:
        wait_for(f"{pattern} in {self.log}", lambda: re.search(pattern, self.cluster.text(self.log)))


def test_a_job_trains_on_both_nodes(cluster):
    job = Job(cluster, "job.log", *SMALL, "train.steps=3", "name=job")
    assert job.wait() == "COMPLETED", cluster.text("job.log")
    assert len(cluster.losses("job")) == 3


def test_scancel_saves_and_the_same_job_resumes(cluster):
    words = (*SMALL, "train.save_every=1000", "name=cancelled")
    job = Job(cluster, "cancel.log", *words, "train.steps=4000", script=CANCELLED)
    job.wait_for("loss")
    cluster.on("node-a", "scancel", job.id)
    assert job.wait() == "CANCELLED"
    assert "quickstart saved and stopped" in cluster.text("cancel.log")
    assert "status 75" in cluster.text("cancel.log")
    again = Job(cluster, "again.log", *words, "train.steps=4000")
    again.wait_for("resuming from step-")
    cluster.on("node-a", "scancel", again.id)
    again.wait()


def test_a_job_that_is_out_of_time_requeues_itself_and_resumes(cluster):
    job = Job(cluster, "requeue.log", *SMALL, "train.save_every=1000", "train.steps=4000", "name=requeued")
    job.wait_for("loss")
    cluster.on("node-a", "scancel", "--signal=USR1", job.id)  # as --signal=USR1@300 sends five minutes before the end
    job.wait_for("quickstart saved and stopped")
    wait_for("the job is in the queue again", lambda: job.state == "PENDING")
    # SLURM waits two minutes. With StartTime=now the job failed: it was still being ended on its nodes.
    job.wait_for(r"resuming from step-.*\n(.*\n)*.*loss")
    cluster.on("node-a", "scancel", job.id)
    job.wait()


def test_a_job_array_is_a_sweep(cluster):
    script = f"""#!/bin/bash
#SBATCH --nodes=1 --array=0-2
exec {ROOT}/launch.sh "$@" name=seed-$SLURM_ARRAY_TASK_ID train.seed=$SLURM_ARRAY_TASK_ID
"""
    job = Job(cluster, "array-%a.log", *SMALL, "train.steps=2", script=script)
    assert job.wait() == "COMPLETED"
    assert {len(cluster.losses(f"seed-{n}")) for n in range(3)} == {2}
    assert len({cluster.losses(f"seed-{n}")[0] for n in range(3)}) == 3
