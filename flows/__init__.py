"""Prefect flows. They and the command line are the only places that construct Settings."""
