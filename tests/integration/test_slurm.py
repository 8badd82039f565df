"""The whole workflow on a SLURM cluster; runs where `sinfo` answers."""

import re
import shutil
import subprocess

import pytest
from workflow_runs import ROOT, Workflow

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("workflow")]

PROFILE = ROOT / "workflow" / "profiles" / "slurm"


@pytest.fixture(scope="module", autouse=True)
def cluster() -> None:
    if shutil.which("sinfo") is None:
        pytest.skip("no SLURM here: there is no sinfo")
    answer = subprocess.run(["sinfo", "--noheader"], capture_output=True, text=True, timeout=60)
    if answer.returncode:
        pytest.skip(f"SLURM does not answer: {answer.stderr.strip()}")


def test_it_ends_in_the_report_and_every_job_ran_on_slurm(demo_census, tmp_path):
    # The nodes must see the folder: give --basetemp on a shared file system where /tmp is not one.
    workflow = Workflow(tmp_path, demo_census.soma)
    workflow.config["seeds"] = [0]
    ended = workflow.run("--workflow-profile", str(PROFILE), "--slurm-init-seconds-before-status-checks", "5", cores=4)
    said = ended.stdout + ended.stderr
    assert ended.returncode == 0, said
    assert (workflow.results / "report" / "index.html").stat().st_size > 100_000

    submitted = re.findall(r"submitted with SLURM jobid (\d+)", said)
    planned = int(re.search(r"^total +(\d+)$", said, flags=re.MULTILINE)[1])
    assert len(submitted) == planned - 1  # all but the rule `all`
    columns = ["--jobs", ",".join(submitted), "--allocations", "--noheader", "--parsable2", "--format", "State"]
    states = subprocess.run(["sacct", *columns], capture_output=True, text=True, check=True).stdout.split()
    assert states == ["COMPLETED"] * len(submitted)
