"""HTML pages: an archive, the results of a search, a pretrained model.

Each page is one file that needs nothing else: pictures are inside it, there is no script, and its
content security policy allows only that. Everything that comes from slides or users is escaped.
"""

from pathflip.report.archive import SampleSearch, write_report, write_results
from pathflip.report.pretrain import write_pretrain_report

__all__ = ["SampleSearch", "write_pretrain_report", "write_report", "write_results"]
