"""What every benchmark needs, once: the machine, peak memory, paired timing, results files and pages of the docs.

Only the standard library is imported when a module is loaded, so that a contender's own process, which may belong to
another Python, can use it too; torch is imported by the functions that need it.
"""

from __future__ import annotations

from harness.machine import GIB as GIB
from harness.machine import HERE as HERE
from harness.machine import Row as Row
from harness.machine import cores as cores
from harness.machine import facts as facts
from harness.machine import hardware as hardware
from harness.machine import limit_memory as limit_memory
from harness.machine import load as load
from harness.machine import load_line as load_line
from harness.machine import machine_line as machine_line
from harness.machine import product_rate as product_rate
from harness.machine import versions as versions
from harness.pages import DOCS as DOCS
from harness.pages import MIB as MIB
from harness.pages import fill as fill
from harness.pages import show_bytes as show_bytes
from harness.pages import show_ratio as show_ratio
from harness.pages import show_seconds as show_seconds
from harness.pages import table as table
from harness.pairing import clock as clock
from harness.pairing import interleave as interleave
from harness.pairing import order_of as order_of
from harness.pairing import ratio as ratio
from harness.pairing import spread as spread
from harness.processes import Conversation as Conversation
from harness.processes import peak_bytes as peak_bytes
from harness.processes import reset_peak as reset_peak
from harness.processes import run_measured as run_measured
from harness.results import RESULTS as RESULTS
from harness.results import Tables as Tables
from harness.results import append_line as append_line
from harness.results import brief as brief
from harness.results import newest as newest
from harness.results import read_lines as read_lines
from harness.results import results_path as results_path
from harness.results import rounded as rounded
from harness.results import today as today
from harness.results import write_json as write_json
