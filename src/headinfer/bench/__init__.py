"""Benchmarks of the CPU, the disk and the GPU in one framework: `headinfer bench`.

A suite is a function that gets a job (job.py) and returns measurements (measurement.py). It takes its sizes from
`job.sizes` (sizes.py), times alternatives in turns (timing.py), and is listed in run.py, which runs suites in order and
within a limit of time. results.py writes the measurements of any suite as JSON and Markdown. To add a suite, write such
a function and add it to `CPU_SUITES` or `GPU_SUITES`.

| modules | content |
|---|---|
| cpu_suites, host_time, disk_suites | the CPU's suites, also of the host's time and those that write to a disk |
| cpu_attention | the CPU's decode kernel for each set of instructions |
| batch | several questions about one document against one |
| cpu_model | what the CPU's suites share |
| gpu_link, gpu_decode, gpu_prefill, gpu_attention, gpu_real | one GPU suite each |
| choice | the suites and sizes that the options of the command ask for |
| gpu_point, past, runners, baselines | what GPU suites share: a long context, and ways of holding it |
| plan_check | the planner's predictions against measurements |
| probe | the rates of this machine for the planner, which is not a suite |
"""
