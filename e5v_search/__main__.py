"""`python -m e5v_search` is the command `e5v-search`."""

from e5v_search.cli import main

main()
