/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * vs_uffd - guest memory that arrives when it is touched (postcopy migration).
 *
 * Memory is registered with a userfaultfd that the front-end reads. A thread of ours that touches a page which has not arrived stops in
 * the kernel until the front-end puts it there, or until every copy of the userfaultfd is closed: then it reads zeros.
 */
#ifndef VS_UFFD_H
#define VS_UFFD_H

#include "vs_mem.h"

/* cdef begin */

int vs_uffd_open(struct vs_err *err);	/* a userfaultfd, handshake done; or -errno with what to do about it */
/* fault for pages of all regions of m that are not there; for those registered already nothing changes. -errno */
int vs_mem_uffd_register(const struct vs_mem *m, int uffd, struct vs_err *err);
void vs_mem_uffd_unregister(const struct vs_mem *m, int uffd);

/* cdef end */

#endif
