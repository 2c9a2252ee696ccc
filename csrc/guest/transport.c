// SPDX-License-Identifier: GPL-2.0-only
/*
 * transport.c - the virtio driver: carriers, HELLO, the watchdog.
 *
 * Carriers.  Two virtio ids bring our rings (vso_carriers): 26, which is virtiofs's, only where the tag in its config says that the rings
 * are ours (the probe answers -ENODEV otherwise and the driver core goes on to virtiofs); and 39, which no stock driver claims.
 *
 * First refusal.  virtiofs takes every device of id 26, whatever its tag, and the driver core asks drivers in the order in which they came.
 * Some kernels have virtiofs built in, so it is always there first. Hence a device that it has when we come, or gets later (the bus tells),
 * is taken from it if the tag is ours.
 *
 * A device's life.  probe finds the rings, posts buffers, sends HELLO and waits a moment for the answer, so that a program which
 * starts right after insmod is served. up = the answer came: only then are sockets offered. Down comes from remove, from freeze, from a
 * message that breaks the protocol, or from the watchdog when PINGs stay unanswered: every flow ends with ECONNRESET, and sockets are
 * native until a later HELLO, with a new epoch, is answered; the watchdog tries again at each tick.
 *
 * Lifetime.  remove mirrors probe backwards: no new flows (vso_the_dev cleared), flows ended, rings closed to senders, device reset,
 * tasklets killed, buffers taken back, rings deleted. What remains is memory that flows may still name: their references.
 */
#include <linux/module.h>
#include <linux/random.h>
#include <linux/slab.h>
#include <linux/virtio.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ids.h>
#include <uapi/linux/virtio_fs.h>

#include "vso.h"

#define VSO_VIRTIO_ID_GENERIC	39	/* the device type that QEMU's generic vhost-user device can be given */
#define VSO_HELLO_WAIT		(2 * HZ)
#define VSO_PINGS_MAX		3	/* unanswered ones that mean the device is gone */

static unsigned int vso_ping_secs = 5;
module_param_named(ping_secs, vso_ping_secs, uint, 0444);
MODULE_PARM_DESC(ping_secs, "seconds between signs of life that are asked of the device while it serves sockets (3 missed: gone)");

static struct vso_dev __rcu *vso_the_dev;	/* the one device that serves; others wait in vain */
static DEFINE_MUTEX(vso_the_dev_mutex);

/**
 * vso_dev_get() - the device, if it serves
 *
 * Return: with a reference, or NULL: then everything is native.
 */
struct vso_dev *vso_dev_get(void)
{
	struct vso_dev *dev;

	rcu_read_lock();
	dev = rcu_dereference(vso_the_dev);
	if (dev && (!READ_ONCE(dev->up) || !refcount_inc_not_zero(&dev->ref)))
		dev = NULL;
	rcu_read_unlock();
	return dev;
}

/** vso_dev_knows_netns() - does the device tell network namespaces apart? */
bool vso_dev_knows_netns(void)
{
	struct vso_dev *dev;
	bool knows;

	rcu_read_lock();
	dev = rcu_dereference(vso_the_dev);
	knows = dev && smp_load_acquire(&dev->up) && dev->features & VSO_F_NETNS;
	rcu_read_unlock();
	return knows;
}

/** vso_dev_hairpin() - is this the namespace whose loopback the device serves? */
bool vso_dev_hairpin(const char *name)
{
	struct vso_dev *dev;
	bool hairpin;

	rcu_read_lock();
	dev = rcu_dereference(vso_the_dev);
	hairpin = dev && smp_load_acquire(&dev->up) && !strcmp(dev->hairpin, name);
	rcu_read_unlock();
	return hairpin;
}

void vso_dev_put(struct vso_dev *dev)
{
	if (refcount_dec_and_test(&dev->ref)) {
		xa_destroy(&dev->flows);
		xa_destroy(&dev->accepted);
		vso_hints_set(dev, NULL, 0);
		kfree_rcu(dev, rcu);
	}
}

static void vso_vq_callback(struct virtqueue *vq)
{
	struct vso_dev *dev = vq->vdev->priv;

	tasklet_schedule(&dev->pair[vq->index / 2].tasklet);
}

/* ----------------------------------------------------------------------------------------------------- up, down, alive */

static void vso_dev_set_up(struct vso_dev *dev, bool up)
{
	unsigned int i;

	for (i = 0; i < dev->nr_pairs; i++) {
		struct vso_pair *pair = &dev->pair[i];

		spin_lock_bh(&pair->tx_lock);
		if (!i)
			smp_store_release(&dev->up, up);	/* pairs with vso_dev_hairpin() */
		spin_unlock_bh(&pair->tx_lock);
	}
}

/* the device is gone: every flow ends, sockets are native from here on */
static void vso_dev_down(struct vso_dev *dev)
{
	unsigned int i;

	vso_dev_set_up(dev, false);
	vso_flows_kill(dev, ECONNRESET);
	for (i = 0; i < dev->nr_pairs; i++)
		vso_txq_purge(&dev->pair[i]);
}

static void vso_down_work(struct work_struct *work)
{
	vso_dev_down(container_of(work, struct vso_dev, down_work));
}

/** vso_dev_broken() - the device broke the protocol: end all flows, from any context */
void vso_dev_broken(struct vso_dev *dev, const char *why)
{
	if (READ_ONCE(dev->up))
		dev_err_ratelimited(&dev->vdev->dev, "protocol error: %s; all offloaded sockets are reset\n", why);
	if (!READ_ONCE(dev->stopping))
		schedule_work(&dev->down_work);
}

static void vso_hello_send(struct vso_dev *dev)
{
	struct vso_hello hello = {
		.magic = cpu_to_le32(VSO_MAGIC),
		.abi_major = cpu_to_le16(VSO_ABI_MAJOR),
		.abi_minor = cpu_to_le16(VSO_ABI_MINOR),
		.features = cpu_to_le64(VSO_F_DGRAM | VSO_F_DGRAM_INFO | VSO_F_PING | VSO_F_NETNS | VSO_F_IPX | VSO_F_URGENT | VSO_F_GROUP |
					VSO_F_HINTS | VSO_F_LATE_CLOSED | VSO_F_EARLY_DATA),
		.pairs = cpu_to_le32(dev->nr_pairs),
		.max_payload = cpu_to_le32(VSO_PAYLOAD_MAX),
	};
	struct vso_tx *tx;

	get_random_bytes(&dev->epoch, sizeof(dev->epoch));
	hello.epoch = cpu_to_le64(dev->epoch);
	tx = vso_tx_new(NULL, VSO_HELLO, 0, &hello, sizeof(hello), GFP_KERNEL);
	if (tx)
		vso_tx_submit(&dev->pair[0], tx);
}

/** vso_hello_reply() - the device says what both sides have */
void vso_hello_reply(struct vso_dev *dev, u32 error, const void *payload, u32 len)
{
	struct vso_hello hello;
	u32 pairs, max, name;

	memcpy(&hello, payload, sizeof(hello));
	if (le64_to_cpu(hello.epoch) != READ_ONCE(dev->epoch) || READ_ONCE(dev->up))
		return;		/* the answer to an earlier one */
	pairs = le32_to_cpu(hello.pairs);
	max = le32_to_cpu(hello.max_payload);
	if (error || le32_to_cpu(hello.magic) != VSO_MAGIC || le16_to_cpu(hello.abi_major) != VSO_ABI_MAJOR ||
	    !pairs || pairs > dev->nr_pairs || max < VSO_RX_MIN) {
		dev_err(&dev->vdev->dev, "the device speaks version %u.%u of the protocol, the module %u.%u (error %u, %u pairs): all sockets stay native\n",
			le16_to_cpu(hello.abi_major), le16_to_cpu(hello.abi_minor), VSO_ABI_MAJOR, VSO_ABI_MINOR,
			error, pairs);
		wake_up(&dev->hello_wait);
		return;
	}
	dev->pairs = pairs;
	dev->max_payload = max;
	dev->features = le64_to_cpu(hello.features);
	vso_hints_set(dev, NULL, 0);	/* those of an earlier life */
	memset(dev->hairpin, 0, sizeof(dev->hairpin));
	name = le16_to_cpu(hello.hairpin_len);
	if (dev->features & VSO_F_NETNS && name <= VSO_NETNS_MAX && name <= len - sizeof(hello))
		memcpy(dev->hairpin, payload + sizeof(hello), name);
	dev_info(&dev->vdev->dev, "sockets are offered to the device (%u ring pair%s, protocol %u.%u)\n", pairs,
		 pairs > 1 ? "s" : "", VSO_ABI_MAJOR, min_t(u16, VSO_ABI_MINOR, le16_to_cpu(hello.abi_minor)));
	vso_dev_set_up(dev, true);
	wake_up(&dev->hello_wait);
}

/*
 * Each tick: ask for a sign of life when flows exist and the device was silent since the last one; count what stays unanswered. While the
 * device is down, offer HELLO again, with another epoch: a back-end that came back answers it. Not before the last HELLO was
 * read, so a dead device costs one message, not a ring full.
 */
static void vso_watchdog(struct work_struct *work)
{
	struct vso_dev *dev = container_of(to_delayed_work(work), struct vso_dev, watchdog);
	unsigned long period = max(vso_ping_secs, 1u) * HZ;
	unsigned int i;

	if (READ_ONCE(dev->starved)) {
		WRITE_ONCE(dev->starved, false);
		for (i = 0; i < dev->nr_pairs; i++)
			tasklet_schedule(&dev->pair[i].tasklet);
	}
	if (!READ_ONCE(dev->up)) {
		if (vso_pair_idle(&dev->pair[0]))
			vso_hello_send(dev);
	} else if (READ_ONCE(dev->unanswered) >= VSO_PINGS_MAX) {
		dev_warn(&dev->vdev->dev, "no answer to %u PINGs: offloaded sockets are reset, new ones are native\n",
			 READ_ONCE(dev->unanswered));
		vso_dev_down(dev);
	} else if (atomic_read(&dev->nr_flows) && !time_before(jiffies, READ_ONCE(dev->alive) + period)) {
		WRITE_ONCE(dev->unanswered, dev->unanswered + 1);	/* vso_rx() sets it to 0 */
		vso_pong(&dev->pair[0], VSO_PING, dev->unanswered);
	}
	for (i = 0; i < dev->nr_pairs; i++)
		vso_pair_tick(&dev->pair[i]);
	vso_windows_tick(dev);
	schedule_delayed_work(&dev->watchdog, period);
}

/* ------------------------------------------------------------------------------------------------------ probe, remove */

static int vso_fs_rings(struct virtio_device *vdev)
{
	static const char prefix[] = "vhostsock";
	char tag[sizeof(((struct virtio_fs_config *)NULL)->tag)];
	u32 requests;

	virtio_cread_bytes(vdev, offsetof(struct virtio_fs_config, tag), tag, sizeof(tag));
	if (memcmp(tag, prefix, sizeof(prefix) - 1))
		return -ENODEV;		/* a real virtiofs: not ours */
	virtio_cread_le(vdev, struct virtio_fs_config, num_request_queues, &requests);
	return min_t(u32, requests, 2 * VSO_PAIRS_MAX - 1) + 1;
}

static int vso_generic_rings(struct virtio_device *vdev)
{
	return 2 * VSO_PAIRS_MAX;	/* its config space says nothing: find out by trying */
}

/* how many rings there may be at most, by the device type that carries them */
static const struct {
	u32 id;
	int (*rings)(struct virtio_device *vdev);
} vso_carriers[] = {
	{ VIRTIO_ID_FS, vso_fs_rings },
	{ VSO_VIRTIO_ID_GENERIC, vso_generic_rings },
};

static int vso_carrier_rings(struct virtio_device *vdev)
{
	size_t i;

	for (i = 0; i < ARRAY_SIZE(vso_carriers); i++)
		if (vso_carriers[i].id == vdev->id.device)
			return vso_carriers[i].rings(vdev);
	return -ENODEV;
}

static int vso_find_vqs(struct virtio_device *vdev, unsigned int pairs, struct virtqueue **vqs)
{
	VSO_VQ_ARRAYS(2 * VSO_PAIRS_MAX);
	unsigned int i;

	for (i = 0; i < pairs; i++) {
		VSO_VQ_SET(2 * i, vso_vq_callback, "to-driver");
		VSO_VQ_SET(2 * i + 1, vso_vq_callback, "from-driver");
	}
	return VSO_FIND_VQS(vdev, 2 * pairs, vqs);
}

static int vso_rings_up(struct vso_dev *dev)
{
	struct virtqueue *vqs[2 * VSO_PAIRS_MAX];
	unsigned int i;
	int err;

	WRITE_ONCE(dev->stopping, false);
	/* not every carrier says how many rings there are: too many are EINVAL or ENOENT (virtio_pci_modern), and nothing was enabled */
	while ((err = vso_find_vqs(dev->vdev, dev->nr_pairs, vqs)) && (err == -EINVAL || err == -ENOENT) && dev->nr_pairs > 1)
		dev->nr_pairs--;
	if (err)
		return err;
	for (i = 0; i < dev->nr_pairs; i++)
		vso_pair_start(&dev->pair[i], vqs[2 * i], vqs[2 * i + 1]);
	virtio_device_ready(dev->vdev);
	for (i = 0; i < dev->nr_pairs; i++)
		virtqueue_kick(dev->pair[i].rx);
	vso_hello_send(dev);
	schedule_delayed_work(&dev->watchdog, max(vso_ping_secs, 1u) * HZ);
	return 0;
}

static void vso_rings_down(struct vso_dev *dev)
{
	unsigned int i;

	WRITE_ONCE(dev->stopping, true);
	cancel_delayed_work_sync(&dev->watchdog);
	vso_dev_down(dev);
	for (i = 0; i < dev->nr_pairs; i++)
		vso_pair_close(&dev->pair[i]);
	virtio_reset_device(dev->vdev);
	for (i = 0; i < dev->nr_pairs; i++)
		vso_pair_stop(&dev->pair[i]);
	cancel_work_sync(&dev->down_work);	/* only now: the tasklets schedule it */
	dev->vdev->config->del_vqs(dev->vdev);
}

static int vso_probe(struct virtio_device *vdev)
{
	unsigned int pairs, i;
	struct vso_dev *dev;
	int err;

	if (!virtio_has_feature(vdev, VIRTIO_F_VERSION_1))
		return -ENODEV;
	err = vso_carrier_rings(vdev);
	if (err < 0)
		return err;
	/* a flow needs both directions; more pairs than CPUs only cost memory */
	pairs = clamp_t(unsigned int, err / 2, 0, num_possible_cpus());
	if (!pairs) {
		dev_err(&vdev->dev, "%d ring is not a pair: give the device 2, 4, ... rings\n", err);
		return -EINVAL;
	}
	dev = kzalloc(struct_size(dev, pair, pairs), GFP_KERNEL);
	if (!dev)
		return -ENOMEM;
	dev->vdev = vdev;
	dev->nr_pairs = pairs;
	refcount_set(&dev->ref, 1);
	xa_init_flags(&dev->flows, XA_FLAGS_ALLOC1 | XA_FLAGS_LOCK_BH);
	xa_init_flags(&dev->accepted, XA_FLAGS_LOCK_BH);
	init_waitqueue_head(&dev->hello_wait);
	INIT_DELAYED_WORK(&dev->watchdog, vso_watchdog);
	INIT_WORK(&dev->down_work, vso_down_work);
	for (i = 0; i < pairs; i++)
		vso_pair_init(&dev->pair[i], dev);
	vdev->priv = dev;

	mutex_lock(&vso_the_dev_mutex);
	if (rcu_access_pointer(vso_the_dev)) {
		err = -EBUSY;
		dev_err(&vdev->dev, "another device serves this guest already: this one is not used\n");
	} else {
		err = vso_rings_up(dev);
		if (!err)
			rcu_assign_pointer(vso_the_dev, dev);
	}
	mutex_unlock(&vso_the_dev_mutex);
	if (err) {
		vso_dev_put(dev);
		return err;
	}
	if (!wait_event_timeout(dev->hello_wait, READ_ONCE(dev->up), VSO_HELLO_WAIT))
		dev_warn(&vdev->dev, "the device did not answer yet: sockets stay native until it does\n");
	return 0;
}

static void vso_remove(struct virtio_device *vdev)
{
	struct vso_dev *dev = vdev->priv;

	mutex_lock(&vso_the_dev_mutex);
	rcu_assign_pointer(vso_the_dev, NULL);
	mutex_unlock(&vso_the_dev_mutex);
	vso_rings_down(dev);
	dev_info(&vdev->dev, "gone: sockets are native from here on\n");
	vso_dev_put(dev);
}

#ifdef CONFIG_PM_SLEEP
static int vso_freeze(struct virtio_device *vdev)
{
	vso_rings_down(vdev->priv);
	return 0;
}

static int vso_restore(struct virtio_device *vdev)
{
	return vso_rings_up(vdev->priv);
}
#endif

static const struct virtio_device_id vso_ids[] = {
	{ VIRTIO_ID_FS, VIRTIO_DEV_ANY_ID },
	{ VSO_VIRTIO_ID_GENERIC, VIRTIO_DEV_ANY_ID },
	{ 0 },
};
MODULE_DEVICE_TABLE(virtio, vso_ids);

static struct virtio_driver vso_driver = {
	.driver.name = "virtio_socket",
	.driver.owner = THIS_MODULE,
	.id_table = vso_ids,
	.probe = vso_probe,
	.remove = vso_remove,
#ifdef CONFIG_PM_SLEEP
	.freeze = vso_freeze,
	.restore = vso_restore,
#endif
};

static bool vso_is_carrier(struct device *d)
{
	return vso_carrier_rings(dev_to_virtio(d)) > 0;
}

/* a device that another driver took: virtiofs, for a file system */
static int vso_claim(struct device *d, void *unused)
{
	/* what nobody has was offered to us */
	if (!d->driver || d->driver == &vso_driver.driver || !vso_is_carrier(d))
		return 0;
	device_release_driver(d);
	if (device_driver_attach(&vso_driver.driver, d))
		dev_err(d, "the driver that had this device gave it up, and it cannot be used\n");
	return 0;
}

static void vso_claim_all(struct work_struct *work)
{
	bus_for_each_dev(vso_driver.driver.bus, NULL, NULL, vso_claim);
}

static DECLARE_WORK(vso_claim_work, vso_claim_all);

/* called with the device locked, so the claim itself is left to others */
static int vso_bus_event(struct notifier_block *nb, unsigned long event, void *d)
{
	if (event == BUS_NOTIFY_BOUND_DRIVER && dev_to_virtio(d)->id.device == VIRTIO_ID_FS)
		schedule_work(&vso_claim_work);
	return NOTIFY_DONE;
}

static struct notifier_block vso_bus_notifier = { .notifier_call = vso_bus_event };

int vso_transport_register(void)
{
	int err = register_virtio_driver(&vso_driver);

	if (err)
		return err;
	bus_register_notifier(vso_driver.driver.bus, &vso_bus_notifier);
	vso_claim_all(NULL);
	return 0;
}

void vso_transport_unregister(void)
{
	bus_unregister_notifier(vso_driver.driver.bus, &vso_bus_notifier);
	cancel_work_sync(&vso_claim_work);
	unregister_virtio_driver(&vso_driver);
}
