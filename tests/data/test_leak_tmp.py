from tests.processes import launch
from pathlib import Path
import subprocess,time
def test_it():
    launch(Path('/tmp/w/data/tests/data/epoch_training.py'),'run',1,5,4,2,process_group=False)
    for i in range(5):
        time.sleep(3)
        print(subprocess.run("ps -eo pid,ppid,stat,etimes,wchan:20,cmd | grep forkserver | grep /tmp/w/data | grep -v grep | cut -c1-110",shell=True,capture_output=True,text=True).stdout, flush=True)
