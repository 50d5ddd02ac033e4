"""A seeded fuzzer: whatever a user types, a file holds or a record's author wants, a script ends in
one sentence and a known exit code, writes into its own folders only, and starts no program.

    python -m tests.fuzz --minutes 30 --seed 0
    python -m tests.fuzz --kind record --case "..."     # once more what was found

Each kind of case is a module: `cases()` is the hypothesis strategy that draws one, plain data whose
repr can be read back, and `check(case, place)` yields what is wrong with it.
"""
