"""Django's models and views. Imported once Django has its settings, and by then only."""

# Django carries no types.
# mypy: disable-error-code="import-untyped, misc"

from __future__ import annotations

import time

from django.db import models
from django.http import HttpRequest, HttpResponse
from django.urls import path

from . import SLEEP


class Tag(models.Model):
    name = models.TextField(unique=True)

    class Meta:
        app_label = "benchmarks"
        db_table = "tag"


class Item(models.Model):
    name = models.TextField()
    state = models.TextField()
    counter = models.IntegerField()
    made_at = models.DateTimeField()
    tags = models.ManyToManyField(Tag, db_table="item_tag")

    class Meta:
        app_label = "benchmarks"
        db_table = "item"


class Event(models.Model):
    item_id = models.IntegerField()
    note = models.TextField()

    class Meta:
        app_label = "benchmarks"
        db_table = "event"


def selects(request: HttpRequest, count: int) -> HttpResponse:
    items = Item.objects.using(request.META["benchmarks.alias"])
    return HttpResponse(",".join(items.get(pk=key).name for key in range(1, count + 1)))


def slow(request: HttpRequest) -> HttpResponse:
    items = Item.objects.using(request.META["benchmarks.alias"])
    first = items.get(pk=1).name
    time.sleep(SLEEP)
    return HttpResponse(f"{first},{items.get(pk=2).name}")


urlpatterns = [path("selects/<int:count>", selects), path("slow", slow)]
