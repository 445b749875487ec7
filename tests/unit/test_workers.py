"""What a process does once when it joins the others."""

import subprocess
import sys

import pytest
from run_helpers import LIMIT_S

CODE = """
import gc
import weakref
from lgp_dist.config.run_config import EngineConfig
from lgp_dist.engine.workers import Workers

class Own:
    pass

kept = gc.get_freeze_count()
alive = len(gc.get_objects())
Workers.start(EngineConfig(device="cpu"))
first = gc.get_freeze_count()
assert first - kept > 0.9 * alive and len(gc.get_objects()) < 0.1 * alive
own = Own()
own.itself, seen = own, weakref.ref(own)
Workers.start(EngineConfig(device="cpu"))
del own
gc.collect()
assert seen() is None and gc.get_freeze_count() <= first
"""


@pytest.mark.slow
def test_what_imports_made_is_not_searched_for_garbage() -> None:
    """What is made later is, also where a process joins twice; and the end of it says nothing."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0 and "leaked" not in done.stderr + done.stdout, done.stderr
