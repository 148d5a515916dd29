"""What a run or a testbed takes before it is started: memory, time, money, the compiled program."""
