# SPDX-License-Identifier: MIT
"""The compiler of drop-in steps: a scheduler's own step becomes a `Plan`.

A chain of functions that keep nothing, each file with what goes in and what comes out in its docstring:

1. `symbolic`: an `AffineProxy` stands for a tensor; arithmetic on it builds a `LinearExpr`.
2. `trace`: diffusers' own step runs on proxies.  What it does is a `Trace`; its scalars are on a `Tape` (`tape`), by
   proxies of their own (`scalars`, `scalar_functions`) that read the call's numbers (`inputs`).
3. `lower`: the expressions become the scalars of one row, a `RowLowering`.
4. `compile`: row, inputs, each `Draw` of noise and what is written become a `Plan` (`plan`), or a `Fallback`.

A plan is a template.  Its tape's guards say for which calls it holds; a `TraceTree` finds it for another call and
computes the call's numbers, which `Plan.with_values` puts in.
"""
