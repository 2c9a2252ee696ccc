/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * vs_uffd - guest memory that arrives when it is touched (postcopy migration). What is done here is said in vs_uffd.h.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "vs_mem_priv.h"
#include "vs_uffd.h"

#ifndef USERFAULTFD_IOC_NEW		/* Linux 6.1 */
#define USERFAULTFD_IOC_NEW	_IO(0xAA, 0x00)
#endif

/* One that also serves faults in system calls: devices read and write files straight from and to guest memory. */
static int open_any(void)
{
	int fd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK), dev, why;

	if (fd >= 0 || errno != EPERM)
		return fd;
	dev = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
	if (dev < 0) {
		errno = EPERM;
		return -1;
	}
	fd = ioctl(dev, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
	why = errno;
	close(dev);
	errno = why;
	return fd;
}

int vs_uffd_open(struct vs_err *err)
{
	struct uffdio_api api = { .api = UFFD_API };
	int fd = open_any();

	if (fd < 0 && errno == EPERM)
		return vs_err_set(err, EPERM, "a userfaultfd needs access to /dev/userfaultfd, CAP_SYS_PTRACE, or "
				  "sysctl vm.unprivileged_userfaultfd=1");
	if (fd < 0)
		return vs_err_set(err, errno, "userfaultfd: %s", strerror(errno));
	if (ioctl(fd, UFFDIO_API, &api) < 0) {
		vs_err_set(err, errno, "UFFDIO_API: %s", strerror(errno));
		close(fd);
		return -err->code;
	}
	return fd;
}

int vs_mem_uffd_register(const struct vs_mem *m, int uffd, struct vs_err *err)
{
	for (int i = 0; i < m->n; i++) {
		const struct vs_region *r = m->by_gpa[i].region;
		struct uffdio_register reg = {
			.range = { (uintptr_t)r->map, r->map_len },
			.mode = UFFDIO_REGISTER_MODE_MISSING,
		};

		madvise(r->map, r->map_len, MADV_NOHUGEPAGE);	/* pages arrive one by one; advice only */
		if (ioctl(uffd, UFFDIO_REGISTER, &reg) < 0)
			return vs_err_set(err, errno, "memory region at gpa 0x%" PRIx64 ": UFFDIO_REGISTER: %s", r->gpa, strerror(errno));
		if (!(reg.ioctls & (uint64_t)1 << _UFFDIO_COPY))
			return vs_err_set(err, ENOTSUP, "memory region at gpa 0x%" PRIx64 ": its pages cannot be filled in", r->gpa);
	}
	return 0;
}

void vs_mem_uffd_unregister(const struct vs_mem *m, int uffd)
{
	for (int i = 0; i < m->n; i++) {
		const struct vs_region *r = m->by_gpa[i].region;
		struct uffdio_range range = { (uintptr_t)r->map, r->map_len };

		ioctl(uffd, UFFDIO_UNREGISTER, &range);		/* wakes who waits there; what was never registered is no error to us */
	}
}
