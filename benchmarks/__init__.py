"""fictive against plain Flask-SQLAlchemy and others, in one run: `python -m benchmarks --help`.

`peers/` has the contenders, each written as its documentation says; `measurements.py` and `counts.py` what is
measured; `report.py` and `plots.py` how it is shown.
"""
