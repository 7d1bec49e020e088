"""python -m headinfer"""

from headinfer.cli import main

main()
