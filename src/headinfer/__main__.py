"""Runs the command line for `python -m headinfer`."""

from headinfer.cli.main import main

main()
