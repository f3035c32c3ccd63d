"""``align bisect``: which numeric switches a divergence comes from.

search.py      the smallest set of switches, by asking yes-or-no questions; knows nothing of training
switches.py    where two policies differ, and the policies between them
trial.py       one short training run, judged against the bundle
runs.py        trials with a memory on disk and a budget
attribution.py the plan: both ends, one flip at a time, the smallest set, layers
result.py      what was found, as JSON;  tables.py  for a terminal;  watch.py  progress on stderr
"""
