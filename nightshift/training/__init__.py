"""Training, from the checks before the first step to the last checkpoint. The life of a run:

    check the config, the stored record and the store        # run.py: before any work
    open the data set; plan the steps; resolve the hardware
    take the run's lease                                      # records/lease.py; rank 0 only
    state = newest whole checkpoint, or initialized from the seed

    while steps are left, and neither the validation images nor the clock say that it is enough:
        batch = f(seed, epoch, step)                          # data/batches.py; nothing is carried along
        loss  = forward(batch); backward; update the weights  # loop.py
        after an epoch: a point of the curve, perhaps with the validation images  # validation.py
        --- the step boundary: the state is whole -----------------------------------------------
        stop if the lease is lost                             # recorder.py, rank 0
        end with this step by the clock: the record says so   # clock.py, rank 0
        all ranks agree: report? restart? stop? save? end?    # ranks.py
        report: metrics and progress
        save:   copy the state; hash, upload and commit it during the next steps   # saver.py
        stop:   save this step, wait for the commit, and raise Interrupted

    save the last step, wait for the commit, return the checkpoint to publish: the last, or the best epoch's

A run that is killed anywhere starts again at the top of this page, and ends with the same bits. `Ranks` has a null
variant for a process that trains alone, and `Recorder` one for ranks that record nothing: so the loop has no special
cases.
"""
