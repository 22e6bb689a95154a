"""What makes a Prefect server run nightshift: deployments, work pools, automations, and the worker's process."""
