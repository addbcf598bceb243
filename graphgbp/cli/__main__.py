"""python -m graphgbp.cli"""

from graphgbp.cli import main

main(prog_name="graphgbp")
