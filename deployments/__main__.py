"""`python -m deployments [--warm] worker start --pool POOL`: Prefect's command line, with workers that are patient."""

import sys

from deployments import patient  # before all of Prefect, as it sets what Prefect reads then

# isort: split
from prefect.cli import app

if __name__ == "__main__":  # and not in the processes that are forked
    patient.be_patient()
    if sys.argv[1:2] == ["--warm"]:
        del sys.argv[1]
        patient.be_warm()
    app()
