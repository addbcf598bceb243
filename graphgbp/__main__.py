"""python -m graphgbp"""

from graphgbp.cli import main

main(prog_name="graphgbp")
