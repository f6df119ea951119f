"""`python -m diffumask_fast.dropin`."""

from diffumask_fast.dropin.command import main

main()
