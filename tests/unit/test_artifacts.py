import subprocess, sys
sys.path.insert(0, "tests")
from conftest import SMALL
def test_a(finished_place, lgp):
    r = lgp("run", *SMALL)
    print(r.err, r.out[:300])
    print(subprocess.run("find run -type f | xargs ls -la; du -sh .", shell=True, capture_output=True, text=True).stdout)
    r = lgp("distil", *SMALL, "--distil.alpha", "0.5")
    print(r.err, r.status)
    assert 0
