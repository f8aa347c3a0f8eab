"""Hydra's launcher of Slurm jobs, hardened: a failed job is FAILED in Slurm, too, and a lost one leaves the others be.

The plug-in alone calls a job COMPLETED whose search failed, because Hydra hands its exception over as a result; gives
up the whole sweep at the first job that a node takes with it; and learns of such jobs from Slurm's accounting, which
many clusters do not keep.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher as PluginLauncher
from omegaconf import OmegaConf, open_dict

from search.errors import ConfigError, one_line
from search.sweep import LAUNCHED, SweepError, note_lost

if TYPE_CHECKING:
    from submitit import Job

LOG = logging.getLogger(__name__)
TOOLS = ("sbatch", "srun", "squeue")
UNFINISHED = (
    *("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT"),
    *("REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"),
)
"""States from which a job may still come to its end by itself; Slurm's documentation of squeue lists all."""

LOOK_S = 1.0
"""How often to look for results, which are files."""
ASK_S = 5.0
"""How often to ask Slurm's controller, which serves everyone."""
ANSWER_S = 10.0
"""How long it may take to answer; results are not looked for meanwhile."""
GRACE_S = 20.0
"""How long a job that Slurm calls over may take to show its result, on a shared file system, or to be queued again."""


def install() -> None:
    """Has Hydra take this launcher wherever the plug-in's own is named."""
    name = f"{PluginLauncher.__module__}.{PluginLauncher.__name__}"
    Plugins.instance().class_name_to_class[name] = SlurmLauncher  # of classes elsewhere, Hydra refuses the name


class SlurmLauncher(PluginLauncher):  # type: ignore[misc]
    """Submits the jobs of a sweep as one array, and waits until each has ended, in whatever way."""

    def __call__(self, *arguments: Any, **keywords: Any) -> JobReturn:
        """Runs one job, on its node; what the search raises ends the process, so that Slurm sees it."""
        returned = super().__call__(*arguments, **keywords)
        if returned.status == JobStatus.FAILED:
            raise returned._return_value
        return returned

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Submits the jobs and waits for them.

        Raises:
            ConfigError: If Slurm is not here, or refuses them.
        """
        numbered = dict(enumerate(job_overrides, initial_job_idx))
        jobs = self._submit(numbered)
        array = next(iter(jobs.values())).job_id.partition("_")[0]
        LOG.info(f"Slurm job {array}: {len(jobs)} searches, logs in {Path(self.params['submitit_folder'])}")
        for number, overrides in numbered.items():
            LOG.info(f"\t#{number} : {' '.join(filter_overrides(overrides))}")
        try:
            return self._wait(array, jobs, numbered)
        except KeyboardInterrupt:
            LOG.info(f"the jobs go on without this command; `scancel {array}` ends them")
            raise

    def _submit(self, numbered: Mapping[int, Sequence[str]]) -> dict[int, Job[JobReturn]]:
        import submitit
        from hydra.core.singleton import Singleton

        for tool in TOOLS:
            if shutil.which(tool) is None:
                raise ConfigError(
                    f"hydra/launcher=slurm needs Slurm's {', '.join(TOOLS)}, and {tool} is not on the PATH: "
                    "give the command where jobs are submitted, or use hydra/launcher=local"
                )
        given = {key: value for key, value in self.params.items() if key not in ("submitit_folder", "max_num_timeout")}
        shared = OmegaConf.structured(BaseQueueConf).keys()  # what submitit knows for all clusters
        executor = submitit.AutoExecutor(
            self.params["submitit_folder"], cluster="slurm", slurm_max_num_timeout=self.params["max_num_timeout"]
        )
        executor.update_parameters(**{key if key in shared else f"slurm_{key}": value for key, value in given.items()})
        calls = [
            (list(overrides), "hydra.sweep.dir", number, f"job_{number}", Singleton.get_state())
            for number, overrides in numbered.items()
        ]
        try:
            submitted = executor.map_array(self, *zip(*calls, strict=True))
        except submitit.core.utils.FailedJobError as error:
            raise ConfigError(
                f"Slurm refuses the sweep: {one_line(error)}; `bitplan search -m hydra/launcher=slurm --cfg hydra -p "
                "hydra.launcher` shows what is asked for, and `sinfo` what there is"
            ) from error
        return dict(zip(numbered, submitted, strict=True))

    def _wait(
        self, array: str, jobs: Mapping[int, Job[JobReturn]], numbered: Mapping[int, Sequence[str]]
    ) -> list[JobReturn]:
        returned: dict[int, JobReturn] = {}
        over: dict[int, float] = {}  # since when Slurm calls a job over that has left no result
        asked = time.monotonic()
        while len(returned) < len(jobs):
            time.sleep(LOOK_S)
            for number in jobs.keys() - returned.keys():
                if _has_result(jobs[number]):
                    returned[number] = self._returned(jobs[number], number, numbered[number])
            now = time.monotonic()
            if now - asked < ASK_S:
                continue
            states, asked = states_of(array), now
            for number in jobs.keys() - returned.keys():
                state = None if states is None else states.get(jobs[number].job_id, "UNKNOWN")
                if state is None or state in UNFINISHED:
                    over.pop(number, None)
                elif now - over.setdefault(number, now) > GRACE_S:
                    why = f"Slurm says {state}, and there is no result; see {jobs[number].paths.stderr}"
                    returned[number] = self._failed(number, numbered[number], why)
        return [returned[number] for number in jobs]

    def _returned(self, job: Job[JobReturn], number: int, overrides: Sequence[str]) -> JobReturn:
        outcome, content = job._get_outcome_and_result()
        if outcome == "success":
            LOG.info(f"\t#{number} finished")
            returned: JobReturn = content
            return returned
        return self._failed(number, overrides, content.strip().splitlines()[-1])  # the last of a traceback

    def _failed(self, number: int, overrides: Sequence[str], why: str) -> JobReturn:
        """Notes that a job failed or was lost, where it has not noted more itself."""
        if LAUNCHED:
            why = note_lost(self._directory(number, overrides), LAUNCHED[0], number, overrides, why)
        LOG.info(f"\t#{number} failed: {why}")
        returned = JobReturn(overrides=list(overrides), status=JobStatus.FAILED)
        returned.return_value = SweepError(f"job {number}: {why}")
        return returned

    def _directory(self, number: int, overrides: Sequence[str]) -> Path:
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config.hydra.job):
            config.hydra.job.id, config.hydra.job.num = f"job_{number}", number
        return Path(str(config.hydra.sweep.dir)).absolute() / str(config.hydra.sweep.subdir)


def _has_result(job: Job[JobReturn]) -> bool:
    folder = job.paths.folder
    if folder.is_dir():
        folder.chmod(folder.stat().st_mode)  # has a network file system look again
    return Path(job.paths.result_pickle).exists()


def states_of(array: str) -> dict[str, str] | None:
    """The states of an array's jobs, by their ids; None where Slurm's controller does not answer.

    Jobs that ended are there for some minutes (`MinJobAge`), afterwards they are missing.
    """
    command = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={array}", "--format=%i|%T"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S, check=False)
    except (subprocess.TimeoutExpired, OSError):
        return None
    if done.returncode:
        return {} if "Invalid job id" in done.stderr else None
    rows = (line.strip().partition("|") for line in done.stdout.splitlines())
    return {name: state for name, _, state in rows}
