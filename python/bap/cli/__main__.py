from bap.cli import main

main()
