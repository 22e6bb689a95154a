"""Every error nightshift raises on purpose, on one page.

    NightshiftError                 exit 1   the world: storage, data, disk, a bug
    ├── UserError                   exit 2   the user's mistake; nothing was started
    │   ├── ConfigError                      a recipe, field, model or run id that is not valid
    │   ├── SettingsError                    an environment variable that does not parse
    │   ├── RunNotFoundError                 no record under this run id
    │   ├── DeploymentNotFoundError          no deployment of this name on the Prefect server
    │   ├── ModelNotFoundError               no such published version, or no champion yet
    │   ├── NoImagesError                    no image was found, or none can be read
    │   ├── SourceError                      a source of images is not there, or is not what it has to be
    │   ├── ResumeMismatchError              the stored run was made with another config or data set
    │   ├── LeaseHeldError                   somebody else is training this run right now
    │   └── RunInUseError                    the run to delete is being trained, or is or was champion
    ├── StorageError
    │   ├── StorageUnreachableError          no answer from the S3 endpoint
    │   │   └── StorageFullError             the disk of the local store is full
    │   ├── StorageDeniedError               the credentials are missing, wrong or too weak
    │   ├── BucketNotFoundError
    │   ├── ObjectNotFoundError
    │   ├── ObjectTooLargeError              larger than any valid object of its kind (internal)
    │   ├── PreconditionFailedError          a conditional write met another version (internal)
    │   ├── DocumentDamagedError             a stored JSON object is not what nightshift wrote
    │   ├── DocumentNewerError               a stored JSON object was written by a newer nightshift
    │   ├── HistoryLostError                 the history of champions is missing, and there was one
    │   └── UnfencedStoreError               the store ignores conditional writes
    ├── DataUnavailableError                 no source of the data set answered
    ├── DataCorruptError                     the data is not what its digest says
    ├── DatasetRejectedError                 tonight's images break a rule that stops the night
    ├── UnreadableImageError                 an image file is none, damaged or too large; the message is the reason
    ├── CheckpointCorruptError               a stored payload is not what its record says
    ├── NotComparableError                   a version that can no longer be built has left too little to compare
    ├── NotPromotedError                     the gate rejected a model, and the settings make that a failure
    ├── ExportError                          an exported file is not what it should be
    ├── TrainingDivergedError                the loss is not a finite number
    ├── NoTimeError                          a run has no time for a single epoch before its verdict is due
    ├── DiskError                            a local disk is full or cannot be written
    ├── LocalServiceError                    the embedded S3, the local Prefect server or worker does not start
    ├── TrackingError                        a server that is only told (MLflow, a webhook) does not answer, or refuses
    ├── PrefectServerError                   the Prefect server does not answer, or refuses a request
    ├── RecoveryLimitError                   a run was restarted automatically as often as is allowed
    ├── RankFailedError                      one of a run's processes failed, and again after every restart
    └── Interrupted                 exit 3   stopped on purpose, or by what can pass; the run can be resumed
        ├── TrainingInterrupted              SIGTERM or SIGINT; the last step is saved
        ├── DeviceError                      the GPU has failed or has no memory left; a new process may go on
        ├── RankLostError                    another of the run's processes is gone, or cannot be reached
        └── LeaseLostError                   another trainer has taken the run over
            └── LeaseExpiredError            the store did not answer for so long that another trainer might

The message of each says what was wrong, where, and what to do next.
"""

import errno

from nightshift.text import masked

DISK_IS_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""The errno of an OSError when there is no room: on the disk, in the quota, or under the limit on a file's size."""


class NightshiftError(Exception):
    """Base of all errors raised on purpose.

    `exit_code` is the command line's exit status; `transient` says whether trying again can help. Whatever the message
    quotes, it holds no password of a URL: messages are printed, logged, and stored in records.
    """

    exit_code = 1
    transient = False

    def __init__(self, message: object = "") -> None:
        super().__init__(masked(str(message)))


class UserError(NightshiftError):
    exit_code = 2


class ConfigError(UserError):
    pass


class SettingsError(UserError):
    pass


class RunNotFoundError(UserError):
    pass


class DeploymentNotFoundError(UserError):
    pass


class ModelNotFoundError(UserError):
    pass


class NoImagesError(UserError):
    pass


class SourceError(UserError):
    pass


class ResumeMismatchError(UserError):
    pass


class LeaseHeldError(UserError):
    pass


class RunInUseError(UserError):
    pass


class StorageError(NightshiftError):
    transient = True


class StorageUnreachableError(StorageError):
    pass


class StorageFullError(StorageUnreachableError):
    pass


class StorageDeniedError(StorageError):
    transient = False


class BucketNotFoundError(StorageError):
    transient = False


class ObjectNotFoundError(StorageError):
    pass


class ObjectTooLargeError(StorageError):
    transient = False


class PreconditionFailedError(StorageError):
    pass


class DocumentDamagedError(StorageError):
    transient = False


class DocumentNewerError(StorageError):
    transient = False


class HistoryLostError(StorageError):
    transient = False


class UnfencedStoreError(StorageError):
    transient = False


class DataUnavailableError(NightshiftError):
    transient = True


class DataCorruptError(NightshiftError):
    pass


class DatasetRejectedError(NightshiftError):
    pass


class UnreadableImageError(NightshiftError):
    pass


class CheckpointCorruptError(NightshiftError):
    pass


class NotComparableError(NightshiftError):
    """A version can no longer be built here, and what it has left is too little to compare it by."""


class NotPromotedError(NightshiftError):
    pass


class ExportError(NightshiftError):
    pass


class TrainingDivergedError(NightshiftError):
    pass


class NoTimeError(NightshiftError):
    pass


class DiskError(NightshiftError):
    pass


class LocalServiceError(NightshiftError):
    pass


class TrackingError(NightshiftError):
    pass


class PrefectServerError(NightshiftError):
    pass


class RecoveryLimitError(NightshiftError):
    pass


class RankFailedError(NightshiftError):
    pass


class Interrupted(NightshiftError):
    exit_code = 3


class TrainingInterrupted(Interrupted):
    pass


class DeviceError(Interrupted):
    pass


class RankLostError(Interrupted):
    pass


class LeaseLostError(Interrupted):
    pass


class LeaseExpiredError(LeaseLostError):
    transient = True
