"""python -m headinfer"""

from headinfer.cli.main import main

main()
