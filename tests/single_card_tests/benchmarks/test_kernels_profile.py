"""The table of a profile, from counters as Nsight Compute prints them."""

import pytest
import typer

pytest.importorskip("triton")

from typer.testing import CliRunner  # noqa: E402

from benchmarks import kernels_profile as profile  # noqa: E402

COUNTERS = """==PROF== Connected
"ID","Kernel Name","Grid Size","gpu__time_duration.sum","launch__registers_per_thread",\
"launch__shared_mem_per_block_dynamic","dram__throughput.avg.pct_of_peak_sustained_elapsed",\
"smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio"
"","","","us","register/thread","Kbyte/block","%","inst","inst"
"0","forward(int)","(4096, 1, 1)","1,069.6","168","217.1","34.2","2.7","9.5"
"1","_cast","(512, 1, 1)","5.2","26","0","","0.1","61.0"
"""


def table(path, *options):
    return CliRunner().invoke(profile.app, ["table", str(path), *options])


def test_a_line_a_kernel(tmp_path):
    path = tmp_path / "counters.csv"
    path.write_text(COUNTERS)
    *_, first, second = table(path).output.splitlines()
    assert first == ("| forward | 1069.6 | (4096, 1, 1) | 168 | 217.1 | 34 % | - | - | - | - | - | "
                     "long scoreboard 9.5, barrier 2.7 |")  # fmt: skip
    assert second.startswith("| _cast | 5.2 |") and "| - |" in second
    assert "dram__throughput.avg.pct_of_peak_sustained_elapsed = 34.2 %" in table(path, "--all-names").output


def test_a_file_without_counters_is_one_error(tmp_path):
    path = tmp_path / "counters.csv"
    path.write_text("==ERROR== The application returned an error code (1)\n")
    with pytest.raises(typer.BadParameter, match="no table of counters.*error code"):
        profile.rows_of(path)
    done = table(path)
    assert done.exit_code == 2 and "Traceback" not in done.output
